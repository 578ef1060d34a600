"""Recipes and everything that turns one into weights."""

from trainables.data.registry import register as register_data_set
from trainables.models import register as register_model
from trainables.plugins import register_all

# Here, and not in the registries: a plug-in's module may import both of them.
register_all("models", lambda plug_in: register_model(plug_in.load()))
register_all("data_sets", lambda plug_in: register_data_set(plug_in.load()))
