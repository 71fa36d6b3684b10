"""The model repository: what is in it, what may be served of it, and what an engine is.

repository, folders, version_choice, model_files   which models and versions there are
config, validation, ranges                         what model.toml says
engine, registry, on_cpu                           the engine protocol, and which engines there are
signatures                                         whether a model's rows are independent
"""
