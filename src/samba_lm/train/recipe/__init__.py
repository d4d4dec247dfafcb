"""A training run as data: a file for each section of a recipe, and the whole."""

from samba_lm.train.recipe.data import ChatSection, DataSection, PasskeySection, PhonebookSection, RecallSection
from samba_lm.train.recipe.lora import LoraSection
from samba_lm.train.recipe.model import VOCAB_MULTIPLE, ModelSection
from samba_lm.train.recipe.parallel import ParallelSection
from samba_lm.train.recipe.recipe import Recipe, read_toml
from samba_lm.train.recipe.section import MAX_NAME_BYTES, PathText, Section
from samba_lm.train.recipe.training import TrainSection

__all__ = [
    "MAX_NAME_BYTES",
    "VOCAB_MULTIPLE",
    "ChatSection",
    "DataSection",
    "LoraSection",
    "ModelSection",
    "ParallelSection",
    "PasskeySection",
    "PathText",
    "PhonebookSection",
    "RecallSection",
    "Recipe",
    "Section",
    "TrainSection",
    "read_toml",
]
