"""Studies: tables of settings that ``vitmix study`` and ``vitmix ablate`` train, as YAML files."""
