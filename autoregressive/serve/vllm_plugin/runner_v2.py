"""What vLLM's model runner V2, which GPUs use, must be told about this model."""

from __future__ import annotations

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class TextPositions(DefaultModelState):
    """Positions of a prompt follow from its own length.

    After a preemption the runner hands over the codes drawn so far behind the prompt, as if they belonged to it.
    """

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request takes a slot, for the first time or after a preemption."""
        rope, self.rope_state = self.rope_state, None
        super().add_request(req_index, new_req_data)
        self.rope_state = rope
        if rope is None:
            return
        prompt, total = new_req_data.prompt_len, len(new_req_data.prefill_token_ids)
        positions, shift = self.model.get_mrope_input_positions([0] * prompt, [])
        rope.prefill_delta.np[req_index] = shift
        for row in range(rope.num_dims):
            known = [int(positions[row, 0]) + i for i in range(total)]
            rope.prefill_positions.stage_write(rope.num_dims * req_index + row, 0, known)
