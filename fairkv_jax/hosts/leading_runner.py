"""A model runner whose work all hosts do: each message is sent before it is executed here."""

from collections.abc import Iterable
from dataclasses import dataclass

import jax

from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.compress.instruction import RepeatInstruction
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.cache_size import size_cache
from fairkv_jax.engine.execution import Execution
from fairkv_jax.engine.model_runner import ModelRunner
from fairkv_jax.engine.prefill_chunking import prefill_bucket
from fairkv_jax.engine.schedule_log import fingerprint
from fairkv_jax.engine.scheduler_output import ExecutionResult, SchedulerOutput
from fairkv_jax.hosts.comparison import Comparison
from fairkv_jax.hosts.leader import Leader
from fairkv_jax.hosts.messages import Accepted, Execute, Start, WarmedUp, WarmUp
from fairkv_jax.plan import Plan
from fairkv_jax.sharding.slots import SlotLayout


class LeadingRunner(ModelRunner):
    """The part of the model on the leader's devices; the followers load theirs meanwhile.

    Raises:
        ValueError: the model does not span all devices; or see `ModelRunner`.
        GroupFailed: a host has failed, or does not agree with the leader.
    """

    def __init__(
        self,
        leader: Leader,
        checkpoint: Checkpoint,
        plan: Plan,
        config: EngineConfig,
        kv_config: KVConfig,
        *,
        eos_token_ids: Iterable[int] = (),
        progress: bool = True,
    ):
        self.leader, self._comparison = leader, Comparison()
        if plan.num_devices != jax.device_count():
            raise ValueError(
                f"tensor_parallel_size is {plan.num_devices}, but the hosts have "
                f"{jax.device_count()} devices together: with several hosts, the model must span "
                "all of them"
            )
        if jax.default_backend() == "cpu":
            self.max_in_flight = 1  # they are executed at once, see `Coordinator`
        instruction, eos_token_ids = None, tuple(eos_token_ids)
        if kv_config.repeats_prompt:
            instruction = RepeatInstruction.of(checkpoint.tokenizer(), kv_config.replay_suffix)
        layout, num_queries = SlotLayout.from_plan(plan), kv_config.num_stored_queries
        leader.send(
            Start(
                config,
                kv_config,
                plan.to_json(),
                size_cache(config, checkpoint.config, layout, num_queries).pages_per_device,
                jax.local_devices()[0].device_kind,
                fingerprint(checkpoint),
                eos_token_ids,
                instruction,
            )
        )
        super().__init__(
            checkpoint,
            plan,
            config,
            kv_config,
            eos_token_ids=eos_token_ids,
            instruction=instruction,
            progress=progress,
        )
        leader.wait_for(Accepted)

    def execute(self, output: SchedulerOutput) -> "LeadingExecution":
        with self.leader.step():
            self.leader.send(Execute(output))
            execution = super().execute(output)
        return LeadingExecution(**vars(execution), runner=self)

    def warm_up(
        self,
        prompt_lengths: Iterable[int],
        num_rows: int,
        *,
        suffix_lengths: Iterable[int] = (),
        prompt_logprobs: bool = True,
        forks: bool = False,
    ) -> None:
        prompts, suffixes = (
            sorted({prefill_bucket(length, self.config) for length in lengths})
            for lengths in (prompt_lengths, suffix_lengths)
        )
        self.leader.send(WarmUp(prompts, num_rows, suffixes, prompt_logprobs, forks))
        super().warm_up(
            prompts,
            num_rows,
            suffix_lengths=suffixes,
            prompt_logprobs=prompt_logprobs,
            forks=forks,
        )
        self.leader.wait_for(WarmedUp)

    def compare(self, output: SchedulerOutput, result: ExecutionResult) -> None:
        """Has the followers compare their tokens from time to time."""
        self._comparison.add(output, result)
        comparison = self._comparison.take()
        if comparison is not None:
            self.leader.send(comparison)


@dataclass(frozen=True)
class LeadingExecution(Execution):
    """An output that the devices of all hosts have been given."""

    runner: LeadingRunner | None = None

    def result(self) -> ExecutionResult:
        assert self.runner is not None
        with self.runner.leader.step():
            result = super().result()
        self.runner.compare(self.output, result)
        return result
