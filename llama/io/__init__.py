"""Files: complete or not at all, JSON, what a source of weights is, models of the hub."""

from llama.io.files import (
    check_new,
    check_output,
    check_outputs,
    check_writable,
    new_directory,
    new_file,
    new_files,
    read_marker,
)
from llama.io.json_files import JsonObject, read_json, write_json
from llama.io.sources import Source, find_source, hub_failure, is_gguf, resolve

__all__ = ["JsonObject", "Source", "check_new", "check_output", "check_outputs", "check_writable"]
__all__ += ["find_source", "hub_failure", "is_gguf", "new_directory"]
__all__ += ["new_file", "new_files", "read_json", "read_marker", "resolve", "write_json"]
