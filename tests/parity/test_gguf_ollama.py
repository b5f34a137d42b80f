"""The Go templates of Modelfiles give, in Go's text/template, what the Jinja templates give. Needs Go on the PATH."""

import json
import shutil
import subprocess

import pytest

from mowa.exporters.gguf.ollama import find_turns, go_template
from tests.exporters.gguf.chat_templates import ALL, METADATA, render

# What Ollama gives to a template: template/template.go, `Execute`.
PROGRAM = """
package main

import ("encoding/json"; "fmt"; "os"; "strings"; "text/template")

type message struct { Role string `json:"role"`; Content string `json:"content"` }
type task struct { Template string `json:"template"`; Messages []*message `json:"messages"` }

func main() {
	var tasks []task
	if err := json.NewDecoder(os.Stdin).Decode(&tasks); err != nil { panic(err) }
	var found []string
	for _, one := range tasks {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		var system []string
		for _, m := range one.Messages { if m.Role == "system" { system = append(system, m.Content) } }
		var text strings.Builder
		values := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": one.Messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil { panic(err) }
		found = append(found, text.String())
	}
	encoded, _ := json.Marshal(found)
	fmt.Println(string(encoded))
}
"""
QUESTION = {"role": "user", "content": 'Say "{{ .System }}"\n\n<b>'}
ANSWER = {"role": "assistant", "content": "<b>"}
SYSTEM = {"role": "system", "content": "Be\nbrief."}
CHATS = [[QUESTION], [QUESTION, ANSWER, QUESTION], [QUESTION, ANSWER, QUESTION, ANSWER, QUESTION]]


def run_go(tasks, folder):
    """Return what Go renders for each task, a dict of template and messages."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("needs Go")
    (folder / "main.go").write_text(PROGRAM)
    command = [go, "run", "main.go"]
    done = subprocess.run(command, input=json.dumps(tasks), capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_go_renders_what_jinja_renders(tmp_path):
    tasks, expected = [], []
    for template in ALL.values():
        turns, _ = find_turns(template, METADATA)
        chats = CHATS + ([[SYSTEM, *one] for one in CHATS] if turns.system else [])
        for chat in chats:
            tasks.append({"template": go_template(turns), "messages": chat})
            expected.append(render(template, chat))
    found = run_go(tasks, tmp_path)
    assert found == expected


def test_an_answer_that_has_begun_is_continued(tmp_path):
    turns, _ = find_turns(ALL["chatml"], METADATA)
    found = run_go([{"template": go_template(turns), "messages": [QUESTION, ANSWER]}], tmp_path)
    assert found[0].endswith("<|im_start|>assistant\n<b>")
