"""How bytes become tensors: files, containers and pickles, without a word on models."""
