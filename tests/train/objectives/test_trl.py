"""The losses of pairs and of rewarded answers against those of TRL's trainers, on the same log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import DpoConfig, GrpoConfig
from gpt_jax.train.objectives.dpo import preference_loss
from gpt_jax.train.objectives.grpo import Rewarded, advantages, policy_loss

trl = pytest.importorskip("trl", reason="needs the extra 'parity'")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

N, T = 6, 9


def trainer(**settings: Any) -> Any:
    """What TRL's losses read of their trainer."""
    accelerator = SimpleNamespace(
        device="cpu",
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        sync_gradients=True,
    )
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    common = {
        "accelerator": accelerator,
        "args": args,
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }
    return SimpleNamespace(**common, **settings)


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """Answers of one token or more, from the first place on."""
    return np.arange(T) < rng.integers(1, T + 1, N)[:, None]


def grpo_of_trl(
    config: GrpoConfig, logprobs: np.ndarray, mask: np.ndarray, rewarded: Rewarded
) -> tuple[float, np.ndarray]:
    """TRL's loss, and its gradient by the log-probabilities, in float64."""
    x = torch.tensor(logprobs, requires_grad=True)
    fake = trainer(
        _get_per_token_logps_and_entropies=lambda *args, **flags: (x, torch.zeros_like(x), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if config.loss == "gspo" else "token",
        beta=config.kl_beta,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        loss_type="grpo" if config.loss == "gspo" else config.loss,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=config.max_new_tokens,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(N, 1, dtype=torch.long),
        "prompt_mask": torch.ones(N, 1),
        "completion_ids": torch.zeros(N, T, dtype=torch.long),
        "completion_mask": torch.tensor(mask.astype(np.float64)),
        "advantages": torch.tensor(rewarded.advantages),
        "old_per_token_logps": torch.tensor(rewarded.old),
        "ref_per_token_logps": torch.tensor(rewarded.reference),
        "num_items_in_batch": torch.tensor(float(mask.sum())),
    }
    loss = trl.GRPOTrainer._compute_loss(fake, None, inputs)
    loss.backward()
    return loss.item(), x.grad.numpy()


@pytest.mark.parametrize("kl_beta", [0.0, 0.04])
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo"])
@pytest.mark.parametrize("seed", range(3))
def test_rewarded_answers(loss: Any, kl_beta: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = GrpoConfig(loss=loss, kl_beta=kl_beta, clip_high=0.28, max_new_tokens=T)
    logprobs, mask = rng.normal(-2, 0.5, (N, T)), random_mask(rng)
    old = logprobs + rng.choice([-0.6, -0.15, 0.0, 0.05, 0.13, 0.5], (N, T))
    reference = logprobs + rng.normal(0, 0.3, (N, T))
    rewarded = Rewarded(rng.normal(size=N), np.ones(N, bool), old, old, reference)

    def ours(x: jax.Array) -> jax.Array:
        as_float32 = jax.tree.map(lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.float32), rewarded)
        sums = policy_loss(config, x, jnp.asarray(mask), as_float32)
        return sums.numerator / sums.denominator

    value, gradient = jax.value_and_grad(ours)(jnp.float32(logprobs))
    expected, expected_gradient = grpo_of_trl(config, logprobs, mask, rewarded)
    assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo"])
@pytest.mark.parametrize("seed", range(3))
def test_pairs(loss: Any, seed: int) -> None:
    """TRL has the chosen answers in the first half of its batch. Its label smoothing is another one than ours."""
    rng = np.random.default_rng(seed)
    B = N // 2
    logprobs, mask, reference = rng.normal(-2, 0.5, (N, T)), random_mask(rng), rng.normal(-8, 2, N)
    x = torch.tensor(logprobs, requires_grad=True)
    zeros = torch.zeros(N, T)
    said = x * torch.tensor(mask)  # Of what is no label, its models say 0.
    outputs = SimpleNamespace(log_probs=said, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    fake = trainer(
        precompute_ref_logps=True,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        beta=0.1,
        label_smoothing=0.0,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(N, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(N, T + 1),
        "completion_mask": torch.tensor(np.pad(mask, ((0, 0), (1, 0))).astype(np.int64)),
        "ref_chosen_logps": torch.tensor(reference[:B]),
        "ref_rejected_logps": torch.tensor(reference[B:]),
    }
    expected = trl.DPOTrainer._compute_loss(fake, lambda **given: outputs, inputs, return_outputs=False)
    expected.backward()

    def ours(x: jax.Array) -> jax.Array:
        drifts = jnp.sum(jnp.where(mask, x, 0), axis=1) - jnp.float32(reference)
        pairs = (jnp.stack([v[:B], v[B:]], axis=1) for v in (drifts, jnp.float32(mask.sum(axis=1))))
        return preference_loss(DpoConfig(loss=loss), *pairs)[0].mean()

    value, gradient = jax.value_and_grad(ours)(jnp.float32(logprobs))
    assert float(value) == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale: Any) -> None:
    """The lines of its `_generate_and_score_completions` that make them of rewards."""
    rewards = np.random.default_rng(0).choice([0.0, 0.5, 1.0], (5, 4))
    r = torch.tensor(rewards)
    deviation = {"group": r.std(dim=1, keepdim=True) + 1e-4, "batch": r.std() + 1e-4, "none": 1.0}[scale]
    expected = (r - r.mean(dim=1, keepdim=True)) / deviation
    np.testing.assert_allclose(advantages(rewards, GrpoConfig(scale=scale))[0], expected, rtol=1e-6, atol=1e-6)
