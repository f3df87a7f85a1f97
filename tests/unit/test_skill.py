"""The skill for assistants: its front matter and its commands. `lacking` checks the JSON keys beside each command."""

import re
import shlex

import click
import pytest
import yaml
from skill import SKILL, lacking, told_keys

from memscope.cli.main import cli

TEXT = SKILL.read_text(encoding="utf-8")
"""The skill, and the commands in its blocks and tables."""
WRITTEN = [
    words
    for line in re.findall(r"```\nmemscope (.*)\n```|`memscope (.*?)`", TEXT)
    if (words := shlex.split("".join(line).partition(" > ")[0]))
]


def test_the_front_matter_names_the_skill_and_says_when_to_use_it():
    _, matter, _ = TEXT.split("---\n", 2)
    told = yaml.safe_load(matter)
    assert told.keys() == {"name", "description"}
    assert told["name"] == SKILL.parent.name
    assert len(told["description"]) <= 1024


@pytest.mark.parametrize("words", WRITTEN, ids=" ".join)
def test_every_command_of_the_skill_is_one_that_memscope_takes(words, monkeypatch):
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None
    monkeypatch.setattr(click.Path, "convert", lambda self, value, parameter, context: value)
    command.make_context(words[0], words[1:])


def test_a_key_that_a_document_lacks_is_found():
    document = {"peak": {}, "settings": [], "steps": [{"step": 0}]}
    found = lacking(document, "diff")
    assert {"peak.before", "categories", "steps[].change"} <= set(found)
    assert not {"settings[].name", "steps[].step"} & set(found)
    assert "runs[].fit" in told_keys("profile")
