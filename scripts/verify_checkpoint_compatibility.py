#!/usr/bin/env python3
"""Verify that checkpoints saved by the local implementation can be loaded back.

    python scripts/verify_checkpoint_compatibility.py --ckpt_path checkpoint.nemo --test_save_load

Loads a `.nemo` or `.ckpt` into the local model, prints what it is, and with --test_save_load saves
it to NAME.test.nemo, loads that, and compares the two state dicts by torch.allclose (atol 1e-5).
A front on the package: what it does is in harness.model and harness.compare.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from harness.checkpoint import open_checkpoint
from harness.comparison.compare import compare
from harness.comparison.comparison import Comparison
from harness.comparison.findings import Finding
from harness.comparison.measuring import AgainstCheckpoint
from harness.comparison.policy import Policy
from harness.errors import HarnessError, ModelError
from harness.fingerprints.scan import fingerprint
from harness.model.config import load_config
from harness.model.loading import Loader
from harness.model.state import state_of
from harness.model.targets import registered, user_code

LINE = "=" * 60
LOCAL = "harness.nest:EncDecDenoiseMaskedTokenPredModel"
KINDS_OF_VALUES = ("dtype", "different", "undecided", "alias")


def heading(title: str, line: str = LINE) -> None:
    click.echo(f"{line}\n{title}\n{line}")


def load(path: Path, config: dict[str, Any] | None, *, seed: int) -> Any:
    heading(f"Loading LOCAL model from checkpoint: {path}")
    with open_checkpoint(path) as checkpoint:
        if checkpoint.config is None and config is None:
            raise ModelError(
                f"{path}: says nothing of the model's configuration",
                hint="give that as well: --config nest_fast-conformer.yaml",
            )
        target = registered(checkpoint.config) or LOCAL
        model = Loader(checkpoint, target=target, config=config).load(path, seed=seed)
    click.echo(f"✓ Successfully loaded {path.suffix} checkpoint")
    counts = [parameter.numel() for parameter in model.parameters()]
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    click.echo(f"  Total parameters: {sum(counts):,}")
    click.echo(f"  Trainable parameters: {sum(trainable):,}\n")
    return model


def round_trip(model: Any, path: Path, config: dict[str, Any] | None) -> Comparison:
    heading("Testing save and reload round-trip")
    saved = path.with_suffix(".test.nemo")
    with user_code(f"{saved}: saving the model", "see that something can be written there"):
        model.save_to(saved)
    click.echo(f"✓ Model saved to {saved}\n")
    reloaded = load(saved, config, seed=2)
    heading("Comparing state dicts: Original Model vs Reloaded Model")
    with state_of(model, "Original Model") as one, state_of(reloaded, "Reloaded Model") as other:
        return compare(
            fingerprint(one, details=lambda tensor: False),
            fingerprint(other, details=lambda tensor: False),
            Policy(atol=1e-5, rtol=1e-5),
            AgainstCheckpoint(expected=one, actual=other),
        )


def report(comparison: Comparison) -> None:
    def of(*kinds: str) -> list[Finding]:
        return [finding for finding in comparison.findings if finding.kind in kinds]

    def listed(lines: list[str]) -> None:
        for line in lines:
            click.echo(f"    ✗ {line}")

    missing = [f.key for f in of("missing", "renamed")]
    unexpected = [f.actual_key or f.key for f in of("unexpected", "renamed")]
    shapes, values = of("shape"), of(*KINDS_OF_VALUES)
    common = len(comparison.expected.tensors) - len(missing)
    click.echo(f"\nKeys comparison:\n  Common keys: {common:,}")
    click.echo(f"  Only in Original Model: {len(missing):,}")
    listed(missing)
    click.echo(f"  Only in Reloaded Model: {len(unexpected):,}")
    listed(unexpected)
    click.echo(f"\nShape mismatches: {len(shapes):,}")
    listed([f"{f.key}: original {f.expected}, reloaded {f.actual}" for f in shapes])
    click.echo(f"\nValue mismatches: {len(values):,}")
    listed([_value_line(finding) for finding in values])
    click.echo()
    if comparison.ok:
        click.echo("✓ State dicts are identical!\n")
        click.echo("✓ SUCCESS: Save and reload round-trip works correctly!")
    else:
        click.echo("✗ State dicts differ!\n")
        click.echo("✗ FAILURE: Save and reload round-trip changes the model")
        click.echo("  Look at save_to and restore_from of the model for the keys above")


def _value_line(finding: Finding) -> str:
    if finding.difference is None:
        return f"{finding.key}: original {finding.expected}, reloaded {finding.actual}"
    return f"{finding.key}: {finding.difference.why}, at most {finding.difference.max_abs[1]:.3e}"


@click.command()
@click.option("--ckpt_path", type=click.Path(path_type=Path), required=True)
@click.option("--config", type=click.Path(path_type=Path), help="A YAML for the local model.")
@click.option("--test_save_load", is_flag=True, help="Also save, reload and compare.")
def main(ckpt_path: Path, config: Path | None, test_save_load: bool) -> None:
    """Verify that a checkpoint loads into the local model, and survives a save and reload."""
    heading("Checkpoint Loading Verification")
    click.echo(f"Checkpoint: {ckpt_path}\nTest save/reload: {test_save_load}\n{LINE}\n")
    heading("TEST: Loading checkpoint in local model", "#" * 60)
    click.echo()
    step = "Checkpoint cannot be loaded in local model"
    try:
        model_config = None if config is None else load_config(config)
        model = load(ckpt_path, model_config, seed=1)
        click.echo("✓ SUCCESS: Checkpoint can be loaded in local model")
        if test_save_load:
            click.echo()
            step = "Save and reload round-trip does not work"
            comparison = round_trip(model, ckpt_path, model_config)
            report(comparison)
            sys.exit(0 if comparison.ok else 1)
    except HarnessError as error:
        click.echo(f"✗ {error}")
        if error.hint:
            click.echo(f"  What to do: {error.hint}")
        click.echo(f"\n✗ FAILURE: {step}")
        sys.exit(1)


if __name__ == "__main__":
    main()
