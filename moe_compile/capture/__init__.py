"""Capture: a fake copy of the model, how its layers are called, and one graph per kind of layer."""
