"""To and from Hugging Face: folders that transformers loads, and checkpoints that training loads.

`configuration_hysparse` and `modeling_hysparse` are copied into every exported folder and stand
there alone: they import nothing of this project.
"""
