"""What the configuration classes of all families have in common: reading config.json, and judging it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from transformers import PretrainedConfig

from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.models import config_rules, generation_file, quantisation, rope
from vllm_d2cache.models.shape import TransformerShape


class DiffusionLMConfig(PretrainedConfig):
    """A config.json, under the names its family gives the keys; keys that nobody names are kept as attributes.

    What it asks is judged by :meth:`unsupported`, not while it is read: ``--hf-overrides`` come in between.
    """

    alias_of: ClassVar[type | None] = None
    """The class that this one is under another model_type (see :meth:`under`)."""
    defaults: ClassVar[dict[str, Any]] = {}
    """Key of config.json -> its value where it is absent or null."""
    required: ClassVar[tuple[str, ...]] = ()
    """Keys of ``defaults`` that a file must name all the same, as published checkpoints differ in them."""
    null_is_absent: ClassVar[bool] = True
    """False: null for a key of ``defaults`` is refused."""
    other_vocabularies: ClassVar[tuple[int, ...]] = ()
    """Sizes, besides the default one, of vocabularies in which the family's own tokens are what they are."""
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Key of config.json -> the values the model class computes. Keys that are absent are not looked at."""

    scales_rope: ClassVar[bool] = False
    """Rotations for more positions than the model was trained on are computed (rope.py)."""
    pads_behind_text: ClassVar[bool] = False
    """Models of the family write the tokenizer's pad token behind the end of a text, or in its place."""
    scaled_rope: Any = None  # rope_parameters of a file that asks for more than a rope_theta
    rope_theta: Any
    mask_token_id: Any  # None where config.json has none; refused by unsupported

    def __init__(self, **kwargs: Any) -> None:
        self.misspelled = [
            *config_rules.spelled_twice(kwargs, self.attribute_map),
            *config_rules.null_problems(kwargs),
        ]
        if kwargs.get("quantization_config") is None and kwargs.get("compression_config") is not None:
            kwargs["quantization_config"] = kwargs.pop("compression_config")  # its older name, which vLLM reads too
        # Keys that would replace what this class is made of, or that transformers would act on.
        fields = {field.name for field in dataclasses.fields(PretrainedConfig)}
        own = {key for key in kwargs if hasattr(type(self), key) and key not in {*fields, "name_or_path"}}
        acted_on = {*config_rules.ACTED_ON, *own} - config_rules.IGNORED
        self.asked = {key: kwargs.pop(key) for key in acted_on & kwargs.keys()}
        dtype = self.asked.get("dtype") or self.asked.get("torch_dtype")
        judged = {key: kwargs[key] for key in kwargs if self.attribute_map.get(key, key) in config_rules.JUDGED}
        super().__init__(
            **{key: value for key, value in kwargs.items() if key not in {*judged, *config_rules.IGNORED}},
            architectures=config_rules.names_of(self.asked.get("architectures")) or None,
            dtype=config_rules.dtype_name(dtype),
        )
        for key, value in judged.items():
            setattr(self, key, value)
        newer, older = self.asked.pop("rope_parameters", None), self.asked.pop("rope_scaling", None)
        self.rope_parameters = newer or older or self.asked.pop("scaled_rope", None)
        if newer and older and newer != older:
            self.asked["rope_scaling"] = older
        if not self.null_is_absent:  # else settle does it
            for key in [key for key in self.defaults if key not in {*kwargs, *config_rules.TOKENS}]:
                if not (kwargs and key in self.required):
                    setattr(self, key, self.defaults[key])
        if "mask_token_id" not in kwargs:  # null is another thing: a checkpoint that has lost it
            self.mask_token_id = self._own_token("mask_token_id")
        if getattr(self, "eos_token_id", None) is None:
            self.eos_token_id = self._own_token("eos_token_id")
        self.settle()

    def _own_token(self, key: str) -> Any:
        """The family's, in its vocabularies; in any other it would be another token."""
        known = (None, self.defaults.get("vocab_size"), *self.other_vocabularies)
        return self.defaults.get(key) if getattr(self, "vocab_size", None) in known else None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read config.json. Files of one family may have another's model_type: their architecture tells."""
        owner = config_rules.owner(config_dict.get("architectures"))
        if owner is not None and owner.config_class() not in (cls, cls.alias_of):
            return owner.config_class().from_dict(config_dict, **kwargs)
        if "self" not in config_dict:
            return super().from_dict(config_dict, **kwargs)
        # A name that no keyword can have.
        made = super().from_dict({key: value for key, value in config_dict.items() if key != "self"}, **kwargs)
        (made[0] if isinstance(made, tuple) else made).asked["self"] = config_dict["self"]
        return made

    @classmethod
    @cache
    def under(cls, model_type: str) -> type[DiffusionLMConfig]:
        """This class for files with another ``model_type``: registries want it to be the class's own."""
        if model_type == cls.model_type:
            return cls
        # transformers gives a subclass without an __init__ of its own a generated one.
        namespace = {"model_type": model_type, "alias_of": cls, "__init__": cls.__init__, "__module__": cls.__module__}
        return type(cls.__name__, (cls,), namespace)

    def __repr__(self) -> str:
        """Short: transformers' own writes out everything, and fails where values are not what it expects."""
        return f"{type(self).__name__}(architectures={self.architectures!r})"

    def standardize_rope_params(self) -> None:
        """Nothing: transformers' own view of RoPE would come back under its names; see :meth:`settle`."""

    def settle(self) -> None:
        """Bring what was read, or overridden since, into one form: defaults, and RoPE's settings as plain keys."""
        if self.null_is_absent:
            for key, default in self.defaults.items():
                if getattr(self, key, None) is None and key not in config_rules.TOKENS:
                    setattr(self, key, default)
        # Files written by newer versions of transformers hold theta and type in one entry.
        entry = vars(self).pop("rope_parameters", None)
        named, more = config_rules.read_rope(entry)
        if entry:  # not what vLLM or transformers would look for: they would act on it
            is_scaled = self.scales_rope and isinstance(more, Mapping) and rope.kind_of(more) in rope.KINDS
            self.scaled_rope = more if is_scaled else None
            if more is not None and not is_scaled:
                self.asked["rope_parameters"] = more
        for key, value in named.items():
            setattr(self, key, value)
        if getattr(self, "use_sliding_window", True) is False:
            self.sliding_window = None  # it says how long a window would be; vLLM would have one

    def check(self) -> None:
        """Settle, and raise ValueError if anything is unsupported: the architecture included."""
        self.settle()
        problem = config_rules.architecture_problem(self.architectures, self.model_type)
        if reasons := [problem] if problem else self.unsupported():
            raise ValueError(config_rules.refusal(reasons))

    def unsupported(self) -> list[str]:
        """Settings that ask for something the model class does not do, or are none at all; empty if there are none.

        Every reason names the key and its value as config.json, or the operator, has them.
        """
        values = dict(vars(self))
        problem = self.quantisation_problem(quantisation.method_of(values.get("quantization_config")))
        reasons = [
            *([problem] if problem else []),
            *self.misspelled,
            *config_rules.asked_problems(self.asked, rope.KINDS if self.scales_rope else ()),
            *config_rules.type_problems(values),
            *config_rules.absent_problems(values, () if self.null_is_absent else self.defaults),
        ]
        if not reasons:  # some of these are worked out from others
            values |= {key: getattr(self, key) for key in self.supported_values if hasattr(self, key)}
        reasons += config_rules.choice_problems(values, self.supported_values)
        if reasons:
            return reasons
        if self.scaled_rope is not None:
            trained: int = self.max_position_embeddings  # attribute_map knows the name
            if reasons := list(rope.problems(self.scaled_rope, trained, self.rope_theta)):
                return reasons
        shape = self.shape()
        return [
            *config_rules.token_problems(values, shape.vocab_size),
            *config_rules.shape_problems(shape),
            *config_rules.size_problems(values, shape),
            *self.disagreements(),
        ]

    def disagreements(self) -> list[str]:
        """Settings that are fine one by one, and that only this family has."""
        return []

    def quantisation_problem(self, method: str | None) -> str | None:
        """Why weights quantised by ``method`` are refused, with the settings of config.json; None if they are not."""
        return quantisation.problem(method, getattr(self, "quantization_config", None))

    def quantisation_note(self, method: str | None) -> str | None:
        """What an operator should know of weights quantised by ``method``; None if nothing."""
        return quantisation.note(method, getattr(self, "quantization_config", None))

    def notes(self) -> list[str]:
        """What is served otherwise than whoever made the checkpoint may expect; in the start's log and doctor's."""
        return []

    def unserved_problem(self) -> str | None:
        """Why no checkpoint of this architecture can be served yet; None if they are."""
        return config_rules.unserved_problem(self.architectures)

    def mask_contradiction(self, tokenizer_config: Mapping[str, Any]) -> str | None:
        """What tokenizer_config.json says otherwise of the mask token, with the words of a refusal; or None."""
        problem = config_rules.mask_contradiction(tokenizer_config, self.mask_token_id)
        return None if problem is None else config_rules.refusal([problem])

    def generation_problems(self, content: Mapping[str, Any]) -> dict[str, str]:
        """Key of a generation_config.json -> why it is refused, for a configuration that has nothing unsupported."""
        return generation_file.problems(content, self.shape().vocab_size, self.mask_token_id)

    def rope_scaling_of(self, trained: int) -> rope.RopeScaling | None:
        """How positions beyond the ``trained`` ones are rotated; None if there are none."""
        return None if self.scaled_rope is None else rope.read(self.scaled_rope, trained)

    def scaled_positions(self) -> int | None:
        """Positions of a file that asks for more than the model was trained on; None of any other."""
        return None if self.scaled_rope is None else self.shape().longest

    def decoding_defaults(self) -> dict[str, Any]:
        """Options of decoding, by plain name, that the family's published code has and this package has otherwise."""
        return {}

    def traits(self) -> FamilyTraits:
        """What the decoding loop must know of the family."""
        raise NotImplementedError

    def shape(self) -> TransformerShape:
        """What the network is built from."""
        raise NotImplementedError


class HubConfig(DiffusionLMConfig):
    """A config.json under transformers' own names."""

    # transformers gives a subclass without an __init__ of its own a generated one.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def settle(self) -> None:
        """As for all families; null heads of keys and values are as many as all heads."""
        super().settle()
        if self.null_is_absent and getattr(self, "num_key_value_heads", None) is None:
            self.num_key_value_heads = self.num_attention_heads

    def shape(self) -> TransformerShape:
        """What all families under these names have in common."""
        return TransformerShape(
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            embedding_size=self.vocab_size,
            max_positions=self.max_position_embeddings,
            norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            tied_head=self.tie_word_embeddings,
            rope_scaling=self.rope_scaling_of(self.max_position_embeddings),
            head_dim=getattr(self, "head_dim", None),
        )
