"""Image encoders, a family a module, each with `Config`, `ImageEncoder`, `config_of`, `features` and `STAGES`."""
