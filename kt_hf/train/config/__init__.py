"""The settings of `kt-hf train`, from a YAML file to checked objects."""
