"""Section of the configuration for what training minimises: tokens, preferences or rewards."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from gpt_jax.config.check import check, check_types

ObjectiveName = Literal["next_token", "dpo", "grpo"]
PreferenceLossName = Literal["sigmoid", "sigmoid_norm", "ipo"]
ReferenceName = Literal["file", "model"]
PolicyLossName = Literal["grpo", "dr_grpo", "dapo", "gspo"]
ScaleName = Literal["group", "batch", "none"]
KLEstimatorName = Literal["k1", "k2", "k3"]
OverlongName = Literal["mask", "keep"]


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation: pairs of a chosen and a rejected answer."""

    # sigmoid (Rafailov et al. 2023), sigmoid_norm (log-probabilities a token; Lambert et al. 2024), ipo (Azar et al.
    # 2023).
    loss: PreferenceLossName = "sigmoid"
    beta: float = 0.1  # How much a change of log-probability counts; with ipo, 1 / (2 beta) a token is to be reached.
    label_smoothing: float = 0.0  # Probability that a pair is the wrong way round (conservative DPO); not with ipo.
    sft_weight: float = 0.0  # Weight of the chosen answer's nats a token, added to the loss (Pang et al. 2024).
    # Log-probabilities of the model to start from: computed once, to a file beside the data, or by that model at each
    # step, which with adapters takes no memory.
    reference: ReferenceName = "file"

    def __post_init__(self) -> None:
        check_types(self, "objective.dpo")
        check(self.beta > 0, "objective.dpo.beta", self.beta, "more than 0")
        smoothed = f"at least 0 and less than 0.5{', and 0 with ipo' * (self.loss == 'ipo')}"
        good = 0 <= self.label_smoothing < 0.5 and not (self.loss == "ipo" and self.label_smoothing)
        check(good, "objective.dpo.label_smoothing", self.label_smoothing, smoothed)
        check(self.sft_weight >= 0, "objective.dpo.sft_weight", self.sft_weight, "0 or more")


@dataclass(frozen=True)
class GrpoConfig:
    """Group relative policy optimisation: problems, several answers to each, and their rewards."""

    # What gives problems and rewards: arithmetic, reasoning-gym:TASK, problems (the set in data.dir), MODULE:NAME.
    environment: str = ""
    options: tuple[str, ...] = ()  # Its options, NAME=VALUE.
    group_size: int = 8  # Answers to each problem.
    max_prompt_tokens: int = 128  # Problems with longer prompts are left out.
    max_new_tokens: int = 128  # Tokens of an answer at most.
    stop: tuple[str, ...] = ()  # Strings that end an answer, besides the tokens that do.
    temperature: float = 1.0  # Of the answers, in drawing them and in the loss.
    top_p: float = 1.0  # Draw from the fewest tokens whose probabilities add up to p; the loss is of the same tokens.
    top_k: int = 0  # Draw from the k most probable tokens only; 0: from all. The loss is of the same tokens.
    # grpo: mean over each answer, then over answers (Shao et al. 2024); dapo: over all tokens (Yu et al. 2025);
    # dr_grpo: over max_new_tokens (Liu et al. 2025); gspo: as grpo, with one ratio an answer (Zheng et al. 2025).
    loss: PolicyLossName = "dapo"
    clip_low: float = 0.2  # The ratio of probabilities counts down to 1 - clip_low,
    clip_high: float = 0.2  # and up to 1 + clip_high.
    kl_beta: float = 0.0  # Weight of the divergence from the model to start from; 0: it is not needed.
    kl_estimator: KLEstimatorName = "k3"  # Schulman's estimators of that divergence.
    iterations: int = 1  # Optimizer steps on the same answers.
    # What divides a reward less its group's mean: the standard deviation of the group or of the batch, or nothing.
    scale: ScaleName = "group"
    overlong: OverlongName = "mask"  # Answers that were cut at max_new_tokens: left out of the loss, or not.
    slots: int = 64  # Answers that are written at one time, where each replica of the parameters lies.
    judges: int = 0  # Processes that judge answers; 0: one for each core but one.
    judge_timeout: float = 60.0  # Seconds after which a reward is given up, and with it the run.
    eval_problems: int = 200  # Held-out problems in an evaluation, at most.
    eval_temperature: float = 0.0  # Of the answers to them; 0: always the most probable token.

    def __post_init__(self) -> None:
        check_types(self, "objective.grpo")

        def at_least(least: float, *names: str) -> None:
            for name in names:
                check(getattr(self, name) >= least, f"objective.grpo.{name}", getattr(self, name), f"{least} or more")

        check(self.group_size >= 2, "objective.grpo.group_size", self.group_size, "2 or more: answers are compared")
        at_least(1, "max_prompt_tokens", "max_new_tokens", "iterations", "slots", "eval_problems")
        at_least(0, "top_k", "kl_beta", "judges", "eval_temperature")
        for name in ("temperature", "judge_timeout", "clip_low", "clip_high"):
            check(getattr(self, name) > 0, f"objective.grpo.{name}", getattr(self, name), "more than 0")
        check(0 < self.top_p <= 1, "objective.grpo.top_p", self.top_p, "more than 0 and at most 1")
        check(self.clip_low <= 1, "objective.grpo.clip_low", self.clip_low, "at most 1")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What training minimises."""

    # next_token: the nats of texts and conversations; dpo: preferences; grpo: rewards of the model's own answers.
    name: ObjectiveName = "next_token"
    dpo: DpoConfig = field(default_factory=DpoConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)

    def __post_init__(self) -> None:
        check(self.name in get_args(ObjectiveName), "objective.name", self.name, " or ".join(get_args(ObjectiveName)))
        allowed = "what gives problems and rewards: arithmetic, reasoning-gym:TASK, problems, MODULE:NAME"
        if self.name != "grpo":
            allowed = "empty without --objective.name grpo"
        fits = (self.name == "grpo") == (self.grpo.environment != "")
        check(fits, "objective.grpo.environment", self.grpo.environment, allowed)
