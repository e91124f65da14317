"""What the main job is to do: settings only, so that the command line can show them without loading anything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """A study. The defaults are the main job on a laptop's CPU.

    steps, batch_size: of both arms, which see the same data in the same order. watch_every: optimizer steps between measurements,
    on watch_items questions. held_out: questions for before and after. sweep_items, sweep_texts: questions and general passages at each
    strength. faith_items: questions whose thinking is cut. drift_items: questions, and at most as many passages, whose activations are compared.
    """

    model: str = "specimen"
    seed: int = 0
    steps: int = 32
    batch_size: int = 16
    watch_every: int = 16
    watch_items: int = 16
    held_out: int = 128
    sweep_items: int = 32
    sweep_texts: int = 16
    faith_items: int = 32
    drift_items: int = 16
    max_new_tokens: int = 60
    device: str = "auto"

    def in_words(self) -> str:
        """What the study will do, in a sentence."""
        return (
            f"{self.model}: {self.steps} steps of {self.batch_size} chained sums with LIFT, the same with full fine-tuning (seed {self.seed}, watched every "
            f"{self.watch_every} steps on {self.watch_items} questions); then accuracy on {self.held_out} held-out sums, a strength sweep "
            f"({self.sweep_items} questions, {self.sweep_texts} passages), early answers ({self.faith_items}), drift ({self.drift_items}), geometry, and report.html"
        )
