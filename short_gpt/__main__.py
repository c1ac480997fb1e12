"""``python -m short_gpt``: the console script ``short-gpt``."""

from short_gpt.cli.app import main

if __name__ == "__main__":
    main()
