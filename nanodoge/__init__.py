"""What the stages stand on: attention, experts and losses that are fast, the engine that generates, data, runs."""
