"""Every shell command in README and docs runs, here or in a test that the page names, or the page says why it cannot.

What each page says of its commands lies in comments that its readers do not see: tests/docs/commands.py has the forms.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.docs.commands import (
    MARKERS,
    PROGRAMS,
    REPOSITORY,
    Block,
    Command,
    blocks,
    blocks_of,
    flags,
    inline,
    prose,
)
from tests.docs.conftest import Answer, asks, documented, environment, mentioned
from tests.docs.homes import GIVEN, make_home

pytestmark = pytest.mark.timeout(900)  # on a machine that others use

SHELL = [block for block in blocks() if block.shell]
MAKEFILE = (REPOSITORY / "Makefile").read_text()
MORE_FLAGS = {"--debug"}
"""That every job takes and no help lists."""
GUIDE = "infra/kuberay/README.md"
JOBS = {path.stem for path in (REPOSITORY / "jobs").glob("*.py")}
TESTED = re.compile(r"^(?:def|from|import) ", re.MULTILINE)
"""Marks Python: .ci/run names targets of the Makefile."""
Answers = dict[tuple[str, ...], Answer]


def of(*kinds: str) -> list[Block]:
    """The blocks with these markers."""
    return [block for block in SHELL if block.kind in kinds]


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_each_block_says_how_it_is_tested(block: Block) -> None:
    assert block.kind in MARKERS, f"{block}: put one of {MARKERS} in a comment before it (tests/docs/commands.py)"
    assert block.commands, f"{block} has no command: name the language of what it is"
    if block.kind == "not run":
        assert len(block.what.split()) >= 3, f"{block}: say why"
    elif block.kind == "checked by":
        assert block.given, f"{block}: name the tests"
    else:
        assert set(block.given) <= set(GIVEN), f"{block}: tests/docs/homes.py has {', '.join(GIVEN)}"


@pytest.mark.parametrize("block", of("checked by"), ids=str)
def test_the_tests_that_a_block_names_run_its_programs(block: Block) -> None:
    text = "\n".join((REPOSITORY / name).read_text() for name in block.given)
    for command in block.commands:
        for program in programs(command):
            started = (
                rf"\b{re.escape(program)}\b" if program not in JOBS or not TESTED.search(text) else starts(program)
            )
            assert re.search(started, text), f"{block}: {program}"


def starts(job: str) -> str:
    """How a test starts a job: as the first of some words, by its file, or by a helper of the tests."""
    ways = [rf"""[\[(]\s*["']{job}["']""", rf"jobs/{job}\.py"]
    return "|".join([*ways, r"\btrain\(cluster\b", r"\bsmoke_run\b"] if job == "train" else ways)


@pytest.mark.parametrize(
    ("text", "does"),
    [
        ('run_job(["doctor", "--json"], env)', True),
        ('run(f"{REPOSITORY}/jobs/doctor.py")', True),
        ('"""What the doctor says."""', False),
        ("from services.doctor import examine", False),
    ],
)
def test_a_word_in_a_test_is_not_yet_a_program_that_it_starts(text: str, does: bool) -> None:
    assert bool(re.search(starts("doctor"), text)) is does


MANIFESTS = list(blocks_of(GUIDE, (REPOSITORY / GUIDE).read_text()))


@pytest.mark.parametrize("block", [block for block in MANIFESTS if block.shell], ids=str)
def test_each_block_for_kubernetes_says_why_it_is_not_run(block: Block, helps: dict[str, str]) -> None:
    """They are for a cluster of others, in a shell's own grammar; the jobs in them know their flags."""
    assert block.kind in ("not run", "checked by"), f"{block}: put a comment before it (tests/docs/commands.py)"
    assert len(block.what.split()) >= 3 or block.kind == "checked by", f"{block}: say why"
    for job, words in re.findall(r"jobs/(\w+)\.py([^\"'\n]*)", block.body):
        known = set(re.findall(r"--[\w.]+", helps[job]))
        assert set(flags(words.split())) <= known, f"{block}: jobs/{job}.py{words}"


def programs(command: Command) -> list[str]:
    """What a test of the command must speak of: jobs by their names, else a target or a subcommand."""
    if command.words[0] in ("export", "source"):
        return []
    if command.words[0] == "make":
        jobs = [job for target in command.words[1:] for job in re.findall(r"jobs/(\w+)\.py", recipe(target))]
        return jobs or [f"make {target}" for target in command.words[1:]]
    if command.job is not None:
        return [command.job]
    inner = [] if command.inner is None else programs(command.inner)
    return [command.words[1] if command.words[0] == "ray" else command.words[0], *inner]


def recipe(target: str) -> str:
    """The commands of a target of the Makefile, and of the files that it needs first."""
    found = re.search(rf"^{re.escape(target)}:([^\n]*)\n((?:\t[^\n]*\n)*)", MAKEFILE, re.MULTILINE)
    assert found, f"there is no make {target}"
    needed = [name for name in found[1].split() if re.search(rf"^{re.escape(name)}:", MAKEFILE, re.MULTILINE)]
    return "".join(recipe(name) for name in needed) + found[2]


def test_every_command_is_parsed_by_its_program(answers: Answers) -> None:
    """Each flag is known, each value is of its kind and may be given with the others."""
    for command in [*documented(), *(one for _, one in mentioned())]:
        for one in (command, command.inner):
            if one is not None and (question := asks(one)) is not None:
                answer = answers[question]
                assert answer.code == 0, f"{one}: {answer.said}"


def test_a_command_that_is_out_of_date_would_be_found(answers: Answers, helps: dict[str, str]) -> None:
    assert answers["train", "tiny", "--no_such_flag", "1"].code == 2
    assert answers["train", "tinny"].code == 2
    assert "--no_such_flag" not in helps["train"]


def test_every_flag_in_the_text_is_taken(helps: dict[str, str]) -> None:
    """`--flag` by itself is of some job, and beside the name of a job, of that one."""
    known = {job: set(re.findall(r"--[\w.]+", text)) for job, text in helps.items()}
    everywhere = set().union(*known.values(), MORE_FLAGS)
    for document, code in inline():
        job = re.match(r"(?:python )?jobs/(\w+)\.py ", code)
        if job and " -- " not in code:
            assert set(flags(code.split())) <= known[job[1]], f"{document}: {code}"
        elif code.startswith("--"):
            for flag in flags(code.split()):  # --limits.* stands for all that begin so
                assert any(one.startswith(flag[:-1]) if flag[-1] == "*" else one == flag for one in everywhere), (
                    f"{document}: {code}"
                )


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
    named = {(document, word) for document, text in prose() for word in re.findall(r"`make ([a-z0-9-]+)", text)}
    named |= {
        (str(block), word) for block in SHELL for c in block.commands if c.words[0] == "make" for word in c.words[1:2]
    }
    assert {target for _, target in named} >= {"train", "test"}
    assert not [place for place in named if place[1] not in targets]


def test_every_named_file_and_extra_exists() -> None:
    """Of the repository: what a command names, and what the text does."""
    extras = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    places = [(str(block), word) for block in SHELL for command in block.commands for word in command.words]
    places += [(document, word) for document, code in inline() for word in code.split()]
    for place, word in places:
        if found := re.fullmatch(r"'?\.\[(\w+)\]'?", word):
            assert found[1] in extras, f"{place}: {word}"
        elif re.fullmatch(
            r"(?:jobs|flam_core|services|tests|infra|docs|\.ci)/[\w./-]*|constraints\.txt|Makefile", word
        ):
            missing = word.startswith("docs/results") or (REPOSITORY / word).exists()
            assert missing, f"{place}: there is no {word}"


def test_no_command_hides_where_it_is_not_looked_for() -> None:
    programs_ = "|".join(PROGRAMS)
    for document, text in prose():
        indented = re.findall(rf"^ {{4,}}(?:{programs_}) .*", text, re.MULTILINE)
        assert not indented, f"{document}: put it into a fence: {indented[0].strip()}"
    for block in blocks():
        if not block.shell and block.language != "python":
            assert not re.search(rf"^(?:\$ )?(?:{programs_}|\w+/\w+\.(?:sh|py)) ", block.body, re.MULTILINE), str(block)


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "python"], ids=str)
def test_python_on_a_page_compiles_and_finds_what_it_imports(block: Block) -> None:
    compile(block.body, str(block), "exec")
    for module, names in re.findall(r"^from ((?:flam_core|services)[\w.]*) import ([\w, ]+)", block.body, re.MULTILINE):
        found = importlib.import_module(module)
        assert not [name for name in names.split(", ") if not hasattr(found, name)], f"{block}: {module}"


def run(block: Block, home: Path) -> None:
    """Run all commands of a block, in turn."""
    make_home(home, block.given)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.body],
        cwd=home,
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("block", of("run"), ids=str)
def test_it_runs(block: Block, tmp_path: Path) -> None:
    run(block, tmp_path / "home")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("block", of("run slowly"), ids=str)
def test_it_runs_slowly(block: Block, tmp_path: Path) -> None:
    run(block, tmp_path / "home")


TEXT = """
<!-- run: given ~/clips, data/grid -->
```
$ FLAM_HOME=. python jobs/train.py tiny --data \\
    data/grid        # a comment
ray job submit --working-dir . -- python jobs/train.py smoke --gpu
```

Words.

```
make test
```
<!-- not run: it has no end -->

```bash
export A=1
```
"""


def test_blocks_and_their_markers_are_read() -> None:
    given, bare, shell = blocks_of("page.md", TEXT)
    assert (given.kind, given.given, given.line) == ("run", ["~/clips", "data/grid"], 3)
    train, submit = given.commands
    assert (train.job, train.arguments) == ("train", ["tiny", "--data", "data/grid"])
    assert submit.inner is not None
    assert (submit.job, submit.inner.job, submit.inner.arguments) == (None, "train", ["smoke", "--gpu"])
    assert (bare.kind, [str(c) for c in bare.commands]) == ("", ["make test"])
    assert (shell.kind, shell.what, shell.language) == ("not run", "it has no end", "bash")
