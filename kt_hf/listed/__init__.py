"""Experts that are a `ModuleList` of MLPs under a block that calls them: a model's own code, and transformers 4's."""
