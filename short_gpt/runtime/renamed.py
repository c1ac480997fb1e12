"""Paths of the last version's modules, which still work and warn with the new ones."""

# inside a package: the old name, and the modules that have its names now
_WITHIN = {
    "checkpoints": "card>provenance mergekit>prune save>hf+meta",
    "cli": "results>tables",
    "evaluation": "documents>tasks llama_lm>harness",
    "healing": ("moments>solver refit_memory>refit_state steps>job+lora teacher>distillation"),
    "jobs": (
        "calibrating>calibration cells>comparing choice>scores "
        "published>reproduction rows>cases scored>scores"
    ),
    "models": (
        "computation>config_file config_check>config_file layer_removal>decoder "
        "rotary>layer_config shape>config_file weights_report>loading"
    ),
    "runtime": "abort>replicas lock>state results>state",
    "scoring": (
        "clusters>moments+lists differences>importance following>run "
        "halves>hooks measuring>run state>run timing>run"
    ),
    "selection": "found>search partial_run>search trials>search",
    "wrappers": "streamed_weights>streamed_transformer sublayers>short_model",
}
# the old path, and the modules that have its names now
MOVED: dict[str, tuple[str, ...]] = {
    "short_gpt.experiments": ("short_gpt.jobs",),
    "short_gpt.jobs.choice_settings": ("short_gpt.jobs.settings", "short_gpt.jobs"),
    "short_gpt.jobs.healing_settings": ("short_gpt.jobs.settings", "short_gpt.jobs"),
    "short_gpt.opening": ("short_gpt.wrappers.opening",),
    "short_gpt.report": ("short_gpt.plots", "short_gpt.cli.tables", "short_gpt.cli"),
    "short_gpt.short_hf": ("short_gpt.wrappers.short_hf",),
    "short_gpt.short_llama": ("short_gpt.wrappers.short_llama",),
    "short_gpt.short_model": ("short_gpt.wrappers.short_model",),
    "short_gpt.streaming": ("short_gpt.wrappers", "short_gpt.runtime.memory"),
    "short_gpt.streaming.memory": ("short_gpt.runtime.memory",),
    "short_gpt.surgery": ("short_gpt.models", "short_gpt.wrappers"),
}
for _package, _moves in _WITHIN.items():
    for _old, _new in (move.split(">") for move in _moves.split()):
        _modules = tuple(f"short_gpt.{_package}.{name}" for name in _new.split("+"))
        MOVED[f"short_gpt.{_package}.{_old}"] = _modules
