"""NEFTune's noise beside transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from lora_jax.models.decoder import embedding_noise


def test_rows_without_padding_have_noise_of_the_size_that_transformers_gives_them() -> None:
    """Quantiles of both distributions, which are uniform with one bound."""
    batch, length, embed, alpha = 4, 48, 256, 7.0
    module = torch.nn.Embedding(3, embed)
    module.neftune_noise_alpha = alpha
    theirs = neftune_post_forward_hook(module.train(), None, torch.zeros(batch, length, embed)).numpy()
    lengths = jnp.full((batch, 1), length)
    ours = embedding_noise(jax.random.key(0), jnp.zeros((batch, length, embed)), lengths, alpha)
    at = np.linspace(0, 1, 21)
    bound = alpha / np.sqrt(length * embed)
    np.testing.assert_allclose(np.quantile(ours, at), np.quantile(theirs, at), atol=0.03 * bound)
    assert neftune_post_forward_hook(module.eval(), None, torch.zeros(1, 2, embed)).abs().max() == 0
