"""The verb annotate: people compare answers on a page; its export and report write what they said."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_fast.cli import inputs
from rlhf_fast.config import AnnotateConfig
from rlhf_fast.config.settings import ConfigError

if TYPE_CHECKING:
    from rlhf_fast.feedback.store import Store

FORMS = ("label-studio", "argilla", "hh", "rewardbench")
NEEDED = ("fastapi", "uvicorn", "jinja2", "multipart", "sqlalchemy", "alembic", "itsdangerous")


@dataclass(frozen=True)
class AnnotateCommand:
    """Let people compare answers on a page, and write what they said as comparisons.

    `rlhf-fast annotate --out DIR --responses FILE` serves a page on this machine and prints a sign-in link for its
    owner, who invites the others. With --prompts FILE --model A,B the answers are sampled first. The same command goes
    on where it stopped. `rlhf-fast annotate export DIR` writes DIR/comparisons.jsonl for the reward and DPO trainers
    and DIR/demonstrations.jsonl, the better answers that people wrote; `rlhf-fast annotate report DIR` a data card.
    `rlhf-fast annotate import DIR FILE` adds the votes of Label Studio's or Argilla's export. For people elsewhere, see
    docs/annotate.md.
    """

    out: str = ""  # folder of the votes
    store: str = ""  # postgresql://USER@HOST/NAME in place of a file in --out; password: ~/.pgpass or PGPASSWORD
    action: str = "serve"  # serve, export, report or import; the word behind the verb
    responses: str = ""  # {"prompt", "responses": [...]} a line, with category and warning where known
    prompts: str = ""  # {"prompt"} a line, to be answered by --model
    model: tuple[str, ...] = ()  # folders, runs or hub names whose answers are compared: A,B
    votes: str = ""  # export of Label Studio or Argilla to import; the word behind the folder
    form: str = ""  # export in this one too: label-studio, argilla, hh or rewardbench
    gold: str = ""  # {"prompt", "chosen", "rejected"} a line: pairs of known answer, by which people are measured
    unsure: tuple[str, ...] = ()  # reward models, or rewards in any form: pairs that they are least sure of come first
    labels: Literal["votes", "model"] = "votes"  # export: confidence by the share of votes, or by the vote model
    heldout: float = 0.1  # export: share of prompts whose pairs are held out
    criteria: str = ""  # YAML list of {name, title, description, examples, scale}; four by default (docs/annotate.md)
    host: str = "127.0.0.1"  # address to listen at; beyond this machine it needs a secret and --proxy
    port: int = 8000  # 0 finds a free one
    proxy: str = ""  # https://NAME of the TLS proxy in front; only then are its forwarded headers trusted
    secret_file: str = ""  # holds what signs logins, 32 or more characters; else RLHF_FAST_ANNOTATE_SECRET
    language: str = "en"  # of the pages' texts, or a translated copy of en.yaml
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)


def run(command: AnnotateCommand) -> None:
    if not command.out:
        raise ConfigError("--out is missing; give it the folder of the votes")
    if command.action not in ("serve", "export", "report", "import"):
        raise ConfigError(f"--action: {command.action!r}; expected serve, export, report or import")
    if bool(command.votes) != (command.action == "import"):
        raise ConfigError("--votes FILE and import go together: rlhf-fast annotate import DIR FILE")
    if command.form and (command.action != "export" or command.form not in FORMS):
        raise ConfigError(f"--form: {command.form!r}; expected one of {', '.join(FORMS)}, with annotate export DIR")
    if not 0 <= command.port < 65536:
        raise ConfigError(f"--port: {command.port}; expected 0 to 65535")
    if bool(command.prompts) != bool(command.model):
        raise ConfigError("--prompts FILE and --model A,B go together; or give --responses FILE")
    own = AnnotateCommand()
    if command.action != "export" and (command.labels, command.heldout) != (own.labels, own.heldout):
        raise ConfigError("--labels and --heldout are of an export: rlhf-fast annotate export DIR")
    if command.action != "serve" and (command.gold or command.unsure):
        raise ConfigError(f"--gold and --unsure are of the page; rlhf-fast annotate {command.action} takes neither")
    if not 0 <= command.heldout < 1:
        raise ConfigError(f"--heldout: {command.heldout:g}; expected a share from 0 to below 1")
    if command.prompts and command.responses:
        raise ConfigError("give either --responses FILE or --prompts FILE with --model A,B")
    files = {
        name: getattr(command, name) for name in ("responses", "prompts", "gold", "votes", "criteria", "secret_file")
    }
    inputs.check(file={key: file for key, file in files.items() if file})
    for name in command.model:
        inputs.check({"model": name})
    for name in command.unsure:
        inputs.check(reward={"unsure": name})
    require_packages("annotate")
    folder = Path(command.out)
    new = command.action == "import" or (command.action == "serve" and bool(command.responses or command.prompts))
    if command.store:
        if importlib.util.find_spec("psycopg") is None:
            raise ImportError("--store needs the package psycopg; pip install 'rlhf-fast[postgres]'")
    elif not new and not (folder / "votes.db").exists():
        raise ConfigError(f"--out: {folder} holds no votes; give --responses FILE, or --prompts FILE with --model A,B")
    from rlhf_fast.feedback.store import Store

    if command.action == "serve":
        _serve(command, folder, new)
        return
    if command.action == "import":
        _import(command, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(command.store or folder / "votes.db", new)
    if command.action == "export":
        _export(store, folder, command)
    else:
        _report(store, folder)


def require_packages(what: str) -> None:
    """Refuse what serves the page where the extra `annotate` is not installed."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{what} needs the package {missing[0]}; pip install 'rlhf-fast[annotate]'")


def _import(command: AnnotateCommand, folder: Path) -> None:
    from rlhf_fast.feedback.exchange import add_votes
    from rlhf_fast.feedback.formats import read_votes
    from rlhf_fast.feedback.store import Store

    tool, items = read_votes(command.votes)  # all of it is read before a store is made
    folder.mkdir(parents=True, exist_ok=True)
    added = add_votes(Store(command.store or folder / "votes.db", new=True), items, tool)
    print(f"{added.votes} new votes of {added.people} new people on {added.pairs} pairs of {tool}")
    if added.replaced:
        print(f"{added.replaced} votes had another answer before; the old ones are marked as undone")
    if added.equal:
        print(f"{added.equal} pairs of two equal responses left out")


def _export(store: Store, folder: Path, command: AnnotateCommand) -> None:
    from rlhf_fast.feedback.exchange import comparisons, demonstrations, judged
    from rlhf_fast.feedback.formats import FORMATS, VOTES
    from rlhf_fast.feedback.quality import disputed, model_labels
    from rlhf_fast.runs.files import write_atomic, write_jsonl

    form, soft = command.form, model_labels if command.labels == "model" else None
    labelled = comparisons(store, soft, command.heldout)
    if store.plan.disputed == "discard":  # of this export alone: another vote may settle a pair
        left_out = {one.pair for one in disputed(store)}
        print(f"{len(left_out)} disputed pairs left out")
        labelled = [row for row in labelled if row["provenance"]["pair"] not in left_out]
    for name, rows in {"comparisons": labelled, "demonstrations": demonstrations(store)}.items():
        if not rows and name == "demonstrations":  # nobody wrote a better answer
            continue
        write_jsonl(folder / f"{name}.jsonl", rows)
        print(f"{len(rows)} {name} written to {folder / name}.jsonl")
    if form:
        out, _ = FORMATS[form]
        given = out(judged(store) if form in VOTES else labelled)
        write_atomic(folder / f"{form}.json", json.dumps(given, ensure_ascii=False, indent=1) + "\n")
        print(f"{len(given)} records written to {folder / form}.json")


def _report(store: Store, folder: Path) -> None:
    from rlhf_fast.feedback.card import card
    from rlhf_fast.feedback.quality import dashboard
    from rlhf_fast.runs.files import write_atomic

    write_atomic(folder / "card.html", card(store))
    figures = dashboard(store)
    print(f"{figures.judged} of {figures.pairs} pairs judged, {figures.votes} of {figures.wanted} votes")
    for one in [figures.overall, *figures.criteria, *figures.categories]:
        shown = f"{one.raw.interval.mean:.0%}" if one.raw.interval else "unknown"
        print(f"agreement, {one.name}: {shown} on {one.raw.doubles} pairs{' (too few)' if one.raw.too_few else ''}")
    if figures.enough:
        print(figures.enough)
    print(f"Data card: {folder / 'card.html'}")


def _serve(command: AnnotateCommand, folder: Path, new: bool) -> None:
    import uvicorn

    from rlhf_fast.feedback.app.security import Access, read_secret
    from rlhf_fast.feedback.app.server import application, texts
    from rlhf_fast.feedback.app.session import listen, sign_in_link
    from rlhf_fast.feedback.criteria import DEFAULT, read_criteria
    from rlhf_fast.feedback.store import Plan, Store

    folder.mkdir(parents=True, exist_ok=True)
    access = Access(read_secret(folder, command.host, command.secret_file), command.host, command.proxy)
    texts(command.language)  # a wrong name is an error before any model is loaded
    asked = read_criteria(command.criteria) if command.criteria else DEFAULT
    store = Store(command.store or folder / "votes.db", new)
    if command.criteria or store.setting("criteria") is None:
        store.set_setting("criteria", [asdict(one) for one in asked])
    store.set_setting("warnings", command.annotate.warnings)
    _fill(store, command)
    store.set_plan(Plan(**{one.name: getattr(command.annotate, one.name) for one in fields(Plan)}))
    if command.unsure:
        _put_unsure_first(store, command.unsure)
    listening = listen(command.host, command.port)
    name = f"[{command.host}]" if ":" in command.host else command.host
    address = command.proxy.rstrip("/") or f"http://{name}:{listening.getsockname()[1]}"
    app = application(store, access, folder, command.language)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, proxy_headers=False))
    print(f"Judging at {address} (Ctrl-C stops)\nSign in as the owner: {sign_in_link(store, address)}", flush=True)
    server.run(sockets=[listening])


def _fill(store: Store, command: AnnotateCommand) -> None:
    """Put the answers of a file, or of the models, into the store; those that are there already stay.

    The next write waits for the disk on behalf of all.
    """
    from rlhf_fast.data.records import read_comparisons, read_prompts

    if command.gold:
        for pair in read_comparisons(command.gold):
            sides = [_text(pair.chosen), _text(pair.rejected)]
            prompt: Any = pair.prompt if isinstance(pair.prompt, str) else [dict(message) for message in pair.prompt]
            store.add_prompt(prompt, sides, pair.category, kind="gold", gold=-1, flush=False)
    if command.responses:
        for record in read_prompts(command.responses):
            answers = record.columns.get("responses")
            if not isinstance(answers, list):
                raise ConfigError(
                    f"--responses: {record.name} has no list of responses; expected {{prompt, responses}}"
                )
            warning = str(record.columns.get("warning") or "")
            store.add_prompt(record.prompt, answers, record.category, warning, flush=False)
        return
    if not command.prompts or store.setting("sampled"):
        return
    from rlhf_fast import models
    from rlhf_fast.rollout.generator import Generator
    from rlhf_fast.rollout.sampling import SamplingParams

    config, records = command.annotate, read_prompts(command.prompts)
    params = SamplingParams(
        n=config.samples_per_model if len(command.model) > 1 else max(2, config.samples_per_model),
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    sampled: list[list[dict[str, Any]]] = [[] for _ in records]
    for place, name in enumerate(command.model):  # a seed each, so that near relatives do not say the same
        own = replace(params, seed=config.seed + place)
        rollouts = Generator(*models.load(name, merged=True)).generate(records, own)
        for i, text in zip(rollouts.prompt_index.tolist(), rollouts.texts, strict=True):
            sampled[i].append({"text": text, "checkpoint": name, "seed": own.seed})
    for record, given in zip(records, sampled, strict=True):
        if len({one["text"] for one in given}) > 1:  # equal answers cannot be compared
            store.add_prompt(record.prompt, given, record.category, flush=False)
    store.set_setting("sampled", True)


def _text(answer: Any) -> str:
    """One answer's text, which is what people are shown."""
    from rlhf_fast.data.records import message_text

    return answer if isinstance(answer, str) else "\n\n".join(message_text(message) for message in answer)


def _put_unsure_first(store: Store, names: tuple[str, ...]) -> None:
    """Order the pairs: one reward is unsure where its scores are near each other, several where their differences, each
    in its own deviations, differ most."""
    import numpy as np

    from rlhf_fast.data.records import PromptRecord
    from rlhf_fast.feedback.exchange import pairs_of
    from rlhf_fast.rewards.model import resolve_reward

    pairs = pairs_of(store)
    if not pairs:
        return
    asked = [PromptRecord(pair["messages"], pair["category"]) for pair in pairs.values() for _ in range(2)]
    texts = [pair[side] for pair in pairs.values() for side in ("first", "second")]
    differences = []
    for name in names:
        scores = np.array(resolve_reward(name, 0.0, 4096, timeout=300.0, retries=2)(asked, texts).scores)
        difference = scores[::2] - scores[1::2]
        differences.append(difference / (float(np.sqrt(np.mean(difference**2))) or 1.0))
    unsure = np.std(differences, axis=0) if len(names) > 1 else -np.abs(differences[0])
    store.set_priorities(dict(zip(pairs, unsure.tolist(), strict=True)))
