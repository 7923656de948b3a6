"""Packaged models: one folder each, in the layout of `DiCoDePipeline.save_pretrained`."""
