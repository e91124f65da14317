"""One self-contained page: what was run, what came out, how to run it again."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analyses import figures
from surgery.whole import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from surgery.record import Record

_STYLE = """
:root { --ink: #1d2430; --soft: #5b6472; --line: #dfe3e8; --wash: #f6f7f9; --mark: #0072b2 }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem }
p { margin: .5rem 0; max-width: 46rem } .soft, figcaption { color: var(--soft); font-size: .9rem }
.big { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1.4rem 0 } .big div { background: var(--wash); border-left: 3px solid var(--mark);
padding: .7rem 1rem; min-width: 10rem } .big b { font-size: 1.5rem; display: block } figure { margin: 1rem 0 }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .88rem; margin: .8rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--soft); font-weight: 600 } td:first-child, th:first-child { text-align: left }
pre { background: var(--wash); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem } details { margin: .6rem 0 }
"""


def write_report(results: Mapping[str, Any], folder: Path, record: Record) -> Path:
    """Draw the study's figures into ``figures/``, its tables into ``tables/*.csv``, and write ``report.html``."""
    from analyses.study import frames

    tables = frames(results)
    drawn = draw_study(tables)
    for name, figure in drawn.items():
        figures.save(figure, folder / "figures" / f"{name}.png")
    for name, table in tables.items():
        table.to_csv(folder / "tables" / f"{name}.csv", index=False)
    text = _page(results, tables, {name: figures.png(figure) for name, figure in drawn.items()}, record)
    return write_whole(folder / "report.html", text)


def draw_study(tables: Mapping[str, DataFrame]) -> dict[str, Figure]:
    """Every figure of the page, by file name."""
    drift: Any = tables["drift"]
    curves: Any = tables["early-answers"]
    task, general = drift[drift["text"] == "task"], drift[drift["text"] == "general"]
    drawn = {
        "before_after": figures.draw(figures.before_after, tables["before-after"], width=4.0, ratio=0.7),
        "loss": figures.draw(figures.training, tables["training"], measure="loss", width=4.0, ratio=0.7),
        "watch_accuracy": figures.draw(
            figures.training, tables["training"], measure="held-out accuracy", width=4.0, ratio=0.7
        ),
        "watch_drift": figures.draw(
            figures.training, tables["training"], measure="drift on task text", width=4.0, ratio=0.7
        ),
        "sweep_accuracy": figures.draw(figures.sweep, tables["sweep"], measure="accuracy", width=4.0, ratio=0.7),
        "sweep_text": figures.draw(figures.sweep, tables["sweep"], measure="text_nll", width=4.0, ratio=0.7),
        "early_answers": figures.draw(figures.early_answers, curves, width=6.0),
        "drift_task": figures.draw(figures.drift, task, measure="mean_shift", width=5.0),
        "drift_general": figures.draw(figures.drift, general, measure="mean_shift", width=5.0),
        "cka_task": figures.draw(figures.drift, task, measure="cka", width=5.0),
        "angles_task": figures.draw(figures.drift, task, measure="angle_mean", width=5.0),
        "geometry_energy": figures.draw(
            figures.geometry, tables["geometry"], measure="energy_principal", width=4.0, ratio=0.7
        ),
        "geometry_rank": figures.draw(
            figures.geometry, tables["geometry"], measure="effective_rank", width=4.0, ratio=0.7
        ),
    }
    if (curves["traces"] == "own").any():
        drawn["early_answers_own"] = figures.draw(figures.early_answers, curves[curves["traces"] == "own"], width=6.0)
    return drawn


def _page(
    results: Mapping[str, Any], tables: Mapping[str, DataFrame], images: Mapping[str, bytes], record: Record
) -> str:
    import pandas as pd

    plan, rows = results["plan"], results["accuracy"]["rows"]
    example = results["example"]

    def image(name: str, caption: str) -> str:
        return picture(images[name], caption)

    boxes = "".join(
        f"<div>{r['arm']}<b>{r['value']:.0%}</b><span class=soft>{r['low']:.0%} to {r['high']:.0%}, n={r['n']}</span></div>"
        for r in rows
    )
    answers = "".join(
        f"<tr><td>{arm}</td><td style='text-align:left;white-space:pre-wrap'>{html.escape(str(given[0]))}</td></tr>"
        for arm, given in results["accuracy"]["answers"].items()
    )
    own = image("early_answers_own", "The same, on each model's own thinking.") if "early_answers_own" in images else ""
    kl: Any = pd.DataFrame(results["drift"]["kl"])
    drift: Any = tables["drift"]
    on = {text: _counted(own["n_transcripts"]) for text, own in drift.groupby("text")}
    of_kl = "; ".join(f"{text}: {_counted(own['n'])}" for text, own in kl.groupby("text", sort=False))
    passages = _counted(tables["sweep"].query("measure == 'text_nll'")["n"])
    matrices = tables["geometry"].groupby(["arm", "layer"]).size()
    over_matrices = f"mean over a layer's matrices, their range shaded ({_counted(matrices)} a layer)"
    seconds = sum(results["clock"].values())
    sections = [
        f"<h1>What tuning did to {html.escape(plan['model'])}</h1>",
        f"<p class=soft>{plan['steps']} optimizer steps of {plan['batch_size']} chained sums, once with LIFT and once with full fine-tuning: the same "
        f"data in the same order. Seed {plan['seed']}. Intervals are 95 %.</p>",
        f'<div class="big">{boxes}</div>',
        "<h2>What it learned</h2>",
        f"<p>Accuracy on {plan['held_out']} held-out sums; a missing answer counts as not right. No expression is in both training and test.</p>",
        pair(
            image(
                "before_after",
                f"Held-out accuracy before and after, Wilson intervals ({_counted(tables['before-after']['n'])}).",
            ),
            image("loss", "Training loss, nats per completion token."),
        ),
        pair(
            image(
                "watch_accuracy",
                f"Accuracy during training, on {plan['watch_items']} held-out sums of another draw, Wilson intervals.",
            ),
            image(
                "watch_drift",
                f"Mean shift of the residual stream since step 0, mean over a few layers, on the worked answers to those {plan['watch_items']} sums.",
            ),
        ),
        _table(tables["before-after"], ["arm", "value", "low", "high", "n", "missing", "method"]),
        f"<details><summary>One question, three answers</summary><p>{html.escape(example['question'])} "
        f"(gold: {html.escape(example['answer'])})</p><table>{answers}</table></details>",
        "<h2>What its task vector does at other strengths</h2>",
        "<p>The base plus a strength times (tuned − base): 0 is the base, 1 the tuned model, negative strengths walk away from it. General text shows what it costs elsewhere.</p>",
        pair(
            image("sweep_accuracy", f"Held-out accuracy, {plan['sweep_items']} questions, Wilson intervals."),
            image("sweep_text", f"Negative log-likelihood of general text, bootstrap over passages ({passages})."),
        ),
        "<h2>Do its answers use the chain of thought?</h2>",
        "<p>The thinking is cut after each sentence and the answer read. A curve that is high on the left gives its answer away early: the rest was not needed. "
        "All three models read the same gold traces; the base was never taught the format. The area over the curve (AOC) is after Lanham et al. 2023.</p>",
        image("early_answers", "Same answer as with the whole thinking, by the share of it given (gold traces)."),
        own,
        _table(_headline_faithfulness(tables["early-answers-summary"]), None),
        "<h2>Where its representations moved</h2>",
        "<p>Residual streams of base and arm on the same tokens. Dotted: the split-half floor, what the measure shows between two halves of the base's own texts.</p>",
        pair(
            image("drift_task", f"Mean shift on the task's text ({on['task']})."),
            image("drift_general", f"Mean shift on general text ({on['general']})."),
        ),
        pair(
            image("cka_task", f"Linear CKA on the task's text ({on['task']}): 1 is no change but rotation."),
            image("angles_task", f"Mean principal angle of the top 8 components ({on['task']})."),
        ),
        f"<p>Divergence of the output distributions, KL(tuned ‖ base) in nats per token, bootstrap over texts ({of_kl}):</p>",
        _table(kl, None),
        "<h2>Which weights moved</h2>",
        "<p>LIFT may only move the principal 5 % of each matrix; full tuning may move all. Energy is the share of the squared change that lies on the principal entries; chance is their share of all entries.</p>",
        pair(
            image("geometry_energy", f"Energy of the change on the principal entries, {over_matrices}."),
            image("geometry_rank", f"Effective rank of the change, {over_matrices}."),
        ),
        _table(_headline_geometry(tables["geometry-summary"]), None),
        "<h2>The arms</h2>",
        _records([_arm_row(arm, found) for arm, found in results["arms"].items()]),
        "<h2>What was run, and how to run it again</h2>",
        f"<pre>{html.escape(' '.join(record.typed))}\n\nsurgery replay FOLDER --to runs/again     # the same study, compared with this one\nsurgery verify FOLDER                      # nothing here has changed since</pre>",
        _records(
            [{"stage": name, "seconds": s} for name, s in results["clock"].items()]
            + [{"stage": "total", "seconds": round(seconds, 1)}]
        ),
        f"<details><summary>Settings and environment</summary><pre>{html.escape(_plain({'settings': plan, 'environment': record.environment}))}</pre></details>",
    ]
    return document(f"model surgery: {plan['model']}", sections)


def document(title: str, sections: Sequence[str]) -> str:
    """A self-contained page of HTML sections in the house style."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return head + "\n".join(sections) + "</html>\n"


def picture(png: bytes, caption: str) -> str:
    """A figure with its caption, the image inside the page."""
    data = base64.b64encode(png).decode()
    return f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def pair(*items: str) -> str:
    """Figures side by side where there is room."""
    return f'<div class="pair">{"".join(items)}</div>'


def html_table(table: DataFrame) -> str:
    """A table in the house style: four digits, nothing where there is no value."""
    return table.to_html(index=False, border=0, na_rep="", float_format=lambda v: f"{v:.4g}")


def _counted(n: Any) -> str:
    """Of how many independent units a table's numbers are."""
    least, most = int(n.min()), int(n.max())
    return f"n={most}" if least == most else f"n={least} to {most}"


def _arm_row(arm: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "arm": arm,
        "method": found["method"],
        "lr": found["settings"]["lr"],
        "steps": found["steps"],
        "numbers free to move": f"{found['trainable']:,}",
        "first loss": round(found["losses"][0], 3),
        "last loss": round(found["losses"][-1], 3),
        "seconds": round(found["seconds"]),
    }


def _headline_faithfulness(table: Any) -> DataFrame:
    wanted = [
        "AOC",
        "AOC, chance-corrected",
        "accuracy with thinking",
        "accuracy without thinking",
        "self-splice change",
    ]
    kept = table[
        table["measure"].isin(wanted) & ~((table["measure"] == "self-splice change") & (table["traces"] == "gold"))
    ]
    return kept[["arm", "traces", "measure", "value", "low", "high", "n", "missing", "seed", "method"]]


def _headline_geometry(table: Any) -> DataFrame:
    wanted = [
        "changed",
        "changed_stored",
        "energy_principal",
        "overlap_largest_principal",
        "norm_ratio",
        "spectral_drift",
        "angle_u_mean",
        "effective_rank",
        "stable_rank",
    ]
    kept = table[(table["part"] == "all") & table["measure"].isin(wanted)]
    return kept.drop(columns=["part"])


def _table(table: Any, columns: list[str] | None) -> str:
    return html_table(table if columns is None else table[columns])


def _records(rows: list[dict[str, Any]]) -> str:
    import pandas as pd

    return _table(pd.DataFrame(rows), None)


def _plain(value: Any) -> str:
    import json

    return json.dumps(value, indent=2, default=str)
