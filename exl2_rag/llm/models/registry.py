"""Building a decoder from a model directory's config and checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from exl2_rag.errors import CheckpointError, SettingsError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.kernels import ops
from exl2_rag.llm.layers.attention import Attention
from exl2_rag.llm.layers.embedding import Embedding, load_embedding
from exl2_rag.llm.layers.linear import DenseLinear, Linear, LinearSpec, load_linear, share_input_order
from exl2_rag.llm.layers.lora import AdaptedLinear
from exl2_rag.llm.layers.mlp import GatedMLP
from exl2_rag.llm.layers.norm import RMSNorm, load_norm
from exl2_rag.llm.layers.rotary import Rotary
from exl2_rag.llm.models import tensor_names
from exl2_rag.llm.models.decoder import Decoder, DecoderLayer


def load_model(
    model_dir: Path,
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    max_seq_len: int,
    precision: str = "exact",
) -> Decoder:
    """Check a checkpoint against the config, then read and prepare all its weights.

    Args:
        model_dir: where both came from; named in errors.
        config: what the model is.
        checkpoint: its tensors.
        device: where it will run.
        max_seq_len: positions to be ready for; longer than the model was made for is allowed.
        precision: "exact" or "fast"; see `load_linear`.

    Raises:
        CheckpointError: a tensor is missing, misshapen, damaged, or belongs to no part of the model.
        SettingsError: `max_seq_len` is not positive.
    """
    if max_seq_len < 1:
        raise SettingsError(f"max_seq_len must be at least 1, got {max_seq_len}")
    loader = ModelParts(config, checkpoint, device, precision)
    try:
        tensor_names.check_tensors(config, checkpoint)
        embedding = loader.embedding()
        # The head before the layers: the largest matrix, for a moment in memory twice.
        head = AdaptedLinear(loader.head(embedding), tensor_names.HEAD_KEY)
        return Decoder(
            config,
            embedding=embedding,
            layers=[loader.layer(index) for index in range(config.n_layers)],
            norm=loader.norm(tensor_names.FINAL_NORM_KEY),
            head=head,
            rotary=Rotary(config.rope, rotary_dim=config.head_dim, max_seq_len=max_seq_len, device=device),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{model_dir}: {error}") from error


class ModelParts:
    """Reads the parts of one model.

    Args:
        make_linear: makes the linear layers; None: `load_linear`.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        precision: str,
        make_linear: Callable[[LinearSpec], Linear] | None = None,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._device = device
        self._precision = precision
        self._memory = ops.WeightMemory()
        self._make_linear = self._load_linear if make_linear is None else make_linear

    def embedding(self) -> Embedding:
        """The token embedding."""
        return load_embedding(
            self._checkpoint,
            tensor_names.EMBEDDING_KEY,
            vocab_size=self._config.vocab_size,
            hidden_size=self._config.hidden_size,
            device=self._device,
        )

    def norm(self, key: str) -> RMSNorm:
        """The norm of this key."""
        config = self._config
        return load_norm(self._checkpoint, key, width=config.hidden_size, eps=config.norm_eps, device=self._device)

    def linear(self, spec: LinearSpec) -> Linear:
        """One linear layer."""
        return self._make_linear(spec)

    def _load_linear(self, spec: LinearSpec) -> Linear:
        return load_linear(
            self._checkpoint,
            spec,
            device=self._device,
            gptq_format=self._config.gptq_format,
            precision=self._precision,
            memory=self._memory,
        )

    def head(self, embedding: Embedding) -> Linear:
        """The output head; where it is the embedding, it shares its memory."""
        spec = tensor_names.head_spec(self._config, self._checkpoint)
        if spec is None:
            return DenseLinear(embedding.weight, None)
        head = self.linear(spec)
        if self._config.tied_embeddings and isinstance(head, DenseLinear):
            table = embedding.weight
            if head.weight.dtype == table.dtype and torch.equal(head.weight, table):
                return DenseLinear(table, None)  # a copy in the file need not be one in memory
        return head

    def _linears(self, specs: Mapping[str, LinearSpec]) -> dict[str, AdaptedLinear]:
        return {name: AdaptedLinear(self.linear(spec), spec.key) for name, spec in specs.items()}

    def layer(self, index: int) -> DecoderLayer:
        """One decoder layer."""
        config = self._config
        attention = self._linears(tensor_names.attention_specs(config, index))
        mlp = self._linears(tensor_names.mlp_specs(config, index))
        share_input_order(attention[name].base for name in ("q_proj", "k_proj", "v_proj"))
        share_input_order(mlp[name].base for name in ("gate_proj", "up_proj"))
        return DecoderLayer(
            input_norm=self.norm(tensor_names.input_norm_key(index)),
            attention=Attention(
                **attention,
                head_dim=config.head_dim,
                softmax_scale=config.softmax_scale,
                sliding_window=config.sliding_windows[index],
            ),
            mlp_norm=self.norm(tensor_names.mlp_norm_key(index)),
            mlp=GatedMLP(**mlp),
        )
