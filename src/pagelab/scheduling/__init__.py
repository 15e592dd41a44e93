"""Who gets how many tokens of a step: batches, the queue, admission, preemption. No torch."""
