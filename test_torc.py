"""Tests of torc.py, in the order of its sections."""
from __future__ import annotations

import ast
import atexit
import base64
import contextlib
import copy
import csv
import doctest
import gzip
import hashlib
import http.client
import http.server
import io
import itertools
import json
import math
import os
import py_compile
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import symtable
import sys
import tempfile
import textwrap
import threading
import time
import types
from pathlib import Path
from typing import NamedTuple

import pytest

import torc

TORC = os.path.abspath(torc.__file__)
SOURCE = Path(TORC).read_text(encoding="utf-8")
ROOT = Path(TORC).parent
PYTHON = sys.executable
PASSWORD = "a long sentence"
LAUNCHER = Path(tempfile.mkdtemp(prefix="torc-tests-")) / "torc_tests.py"
LAUNCHER.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torc\nsys.exit(torc.main())\n")
atexit.register(shutil.rmtree, LAUNCHER.parent, True)
COMMAND = [PYTHON, str(LAUNCHER)]         # torc.py by its cached bytecode: it is started very often
with contextlib.suppress(OSError):        # PYTHONDONTWRITEBYTECODE would let each start compile it
    py_compile.compile(TORC)
# A shell without job control starts its background with SIGINT ignored, which children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


# ==================================================================================================
# Fixtures
# ==================================================================================================


def until(condition, seconds=20.0, what="the condition"):
    """Wait until condition() is true and return its value; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {seconds} s")
        time.sleep(0.01)


OPEN = contextlib.ExitStack()             # stops and closes what a test has opened, at its end


@pytest.fixture(autouse=True)
def closing():
    """Nothing that a test has opened outlives it."""
    yield
    OPEN.close()


# What must hold after every operation, as queries that find what violates it.
DOOMED = ("(j.cancel_on_blocking_job_failure AND EXISTS (SELECT 1 FROM job_dependency d JOIN job p ON p.id ="
          " d.depends_on_job_id WHERE d.job_id = j.id AND (p.status IN"
          f" ({torc.CANCELED}, {torc.TERMINATED}) OR p.status = {torc.FAILED} AND p.dooms)))")
INVARIANTS = {
    "a counter of unfinished dependencies is wrong":
        "SELECT id, name, unfinished FROM job WHERE unfinished <> (SELECT count(*) FROM job_dependency d JOIN"
        f" job p ON p.id = d.depends_on_job_id WHERE d.job_id = job.id AND p.status NOT IN {torc.COMPLETE})",
    "a ready job waits for something": f"SELECT id, name FROM job WHERE status = {torc.READY} AND unfinished > 0",
    "a ready job is to be canceled": f"SELECT id, name FROM job j WHERE status = {torc.READY} AND {DOOMED}",
    "a blocked job waits for nothing":
        "SELECT j.id, j.name FROM job j JOIN workflow w ON w.id = j.workflow_id WHERE j.status ="
        f" {torc.BLOCKED} AND unfinished = 0 AND NOT w.is_canceled",
    "a running job has no owner":
        f"SELECT j.id, j.name FROM job j WHERE j.status = {torc.RUNNING} AND j.compute_node_id IS NULL AND"
        " EXISTS (SELECT 1 FROM compute_node n WHERE n.workflow_id = j.workflow_id AND n.beats)",
    "a job dooms its dependents for no reason, or should":
        f"SELECT id, name, status FROM job WHERE dooms <> (status IN ({torc.CANCELED}, {torc.TERMINATED}) OR"
        f" status = {torc.FAILED} AND dooms)",
    "a job was canceled by a cascade that is no more":
        f"SELECT id, name FROM job j WHERE cascaded AND (status <> {torc.CANCELED})",
    "an action counts its jobs wrongly":
        "SELECT a.id, trigger_type, trigger_count, required_triggers FROM workflow_action a WHERE trigger_type"
        " IN ('on_jobs_ready', 'on_jobs_complete') AND job_ids IS NOT NULL AND (required_triggers <> (SELECT"
        " count(*) FROM action_job WHERE action_id = a.id) OR trigger_count <> (SELECT count(*) FROM action_job"
        " x JOIN job j ON j.id = x.job_id WHERE x.action_id = a.id AND (j.status IN"
        f" {torc.COMPLETE} OR trigger_type = 'on_jobs_ready' AND j.status IN ({torc.READY}, {torc.PENDING},"
        f" {torc.RUNNING}, {torc.PENDING_FAILED}))))",
    "a job's result is another's":
        "SELECT j.id, j.name FROM job j LEFT JOIN result r ON r.id = j.result_id WHERE j.result_id IS NOT NULL"
        " AND (r.id IS NULL OR r.job_id <> j.id)",
    "a reference leads nowhere": "PRAGMA foreign_key_check",
}


def check_store(store):
    """Assert what must hold after every test: counters are true, no status contradicts them."""
    for what, sql in INVARIANTS.items():
        assert store.query(sql) == [], what


@pytest.fixture(scope="session", autouse=True)
def default_port():
    """End at once if this user's server is on the default port: commands that name none would use
    it, and so would many tests."""
    if torc.default_server({}):
        pytest.exit(f"a server of yours listens on port {torc.DEFAULT_PORT}: stop it first", 1)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path_factory):
    """A home of its own for each test, and none of the variables that steer torc."""
    for name in list(os.environ):
        if name.startswith(("TORC_", "SLURM_", "JUPYTER")) or name in ("DATABASE_URL", "RUST_LOG"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("USER", "tester")
    os.umask(0o022)                       # a server run inside of a test has set its own


@pytest.fixture
def store(tmp_path):
    """A store on a file, checked at the end of the test."""
    store = torc.Store(str(tmp_path / "store.db"))
    yield store
    check_store(store)
    store.close()


@pytest.fixture
def api(store):
    """The operations on `store`, called without HTTP."""
    return torc.LocalClient(store.path, "tester", store)


class Server:
    """A real server process on a database file; it and its clients end with the test."""

    def __init__(self, database, port=0, *options, env=None):
        self.database = str(database)
        self.process = subprocess.Popen(
            [*COMMAND, "server", "run", "--port", str(port), "--database", self.database,
             *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(env or {})})
        OPEN.callback(self.stop)
        line = self.process.stdout.readline()
        if not line.startswith("TORC_SERVER_PORT="):
            raise AssertionError(f"the server did not start: {self.process.communicate()}")
        self.port = int(line.split("=")[1])
        self.url = f"http://127.0.0.1:{self.port}{torc.API_PREFIX}"

    def client(self):
        return OPEN.enter_context(contextlib.closing(torc.Client(self.url, "tester")))

    def kill(self):
        """kill -9."""
        self.process.kill()
        self.process.communicate()

    @contextlib.contextmanager
    def closing(self):
        """The server, stopped at the end."""
        try:
            yield self
        finally:
            self.stop()

    def stop(self):
        """SIGTERM; returns (exit code, stderr)."""
        if self.process.poll() is None:
            self.process.terminate()
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


@pytest.fixture
def server(tmp_path):
    """A running server; its database is checked at the end."""
    server = Server(tmp_path / "server.db")
    yield server
    server.stop()
    store = torc.Store(server.database)
    check_store(store)
    store.close()


@pytest.fixture(params=["local", "http"])
def client(request, tmp_path):
    """The same operations in both modes: on a database file, and over HTTP."""
    made = request.getfixturevalue("api" if request.param == "local" else "server")
    client = made if request.param == "local" else made.client()
    yield client
    client.close()


def make(client, graph, start=True, requirements=None, handlers=None, **options):
    """A workflow from {"job": ["dependency", ...]}; returns (workflow id, {name: job id}).

    options: job fields by job name, such as b={"cancel_on_blocking_job_failure": False}; the first
    of the requirements has the id 1.
    """
    place = {name: number for number, name in enumerate(graph, 1)}
    payload = {"workflow": {"name": "test", "user": "tester"},
               "resource_requirements": requirements or [], "failure_handlers": handlers or [],
               "jobs": [{"name": name, "command": "true", **options.get(name, {}),
                         "depends_on_job_ids": [place[other] for other in needs]}
                        for name, needs in graph.items()]}
    workflow_id = client.post("/workflow_specs", payload)["id"]
    if start:
        client.put(f"/workflows/{workflow_id}/status", {"run_id": 1, "is_canceled": False})
        client.post(f"/workflows/{workflow_id}/initialize_jobs")
    ids = {job["name"]: job["id"] for job in client.items("/jobs", workflow_id=workflow_id)}
    return workflow_id, ids


def place_of(path):
    """The path of a route with values."""
    return re.sub(r"<(?:\w+:)?(\w+)>", lambda match: {
        "status": "completed", "managed": "ready", "str": "alice"}.get(match[1], "1"), path)


VALUES = {                                # a valid value of each type of field
    "rules": '[{"exit_codes":[3]}]', "timeout": "PT5M",
    "int": 1, "limit": 1, "float": 2.5, "str": "text", "when": "2026-01-02T03:04:05Z", "echo": "text",
    "bool": True, "any": {"k": [1, None]}, "status": "completed", "final": "completed", "count": 3, "map": {},
    "time": "2026-01-02T03:04:05Z", "positive": 3, "memory": "2g", "duration": "PT5M", "json": "{}", "ids": [1],
    "statuses": "failed,ready", "strs": ["x"], "maps": [], "list": [], "pairs": [[1, 1]], "sizes": [[1, 1, 0]],
    "size": [1, 1, 0], "name": "text"}
NAMED_VALUES = {"role": "admin", "trigger_type": "on_workflow_start", "action_type": "run_commands",
                "action_config": {"commands": ["true"]}, "workflow": {"name": "w", "user": "tester"}}


def valid_value(field):
    """A valid value of a Field, which may be changed."""
    return copy.deepcopy(NAMED_VALUES.get(field.name, VALUES.get(field.type.partition(":")[0])))


def valid_request(method, path, every=False):
    """(query, body) that a route takes, with what it requires, or with every field."""
    endpoint, _ = torc.find_endpoint(method, place_of(path))
    query, body = ({field.name: valid_value(field) for field in wanted or ()
                    if (every or field.required) and not field.server}
                   for wanted in (endpoint.query, endpoint.body))
    if path in ("/bulk_jobs", "/workflows/<workflow>/rerun_jobs"):
        body["jobs"] = [{"workflow_id": 1, "name": "x", "command": "c"} if path == "/bulk_jobs" else {"job_id": 1}]
    return query, None if endpoint.body is None else body.get("value", body)


def statuses(client, workflow_id):
    """{name: status} of a workflow's jobs."""
    return {job["name"]: job["status"] for job in client.items("/jobs", workflow_id=workflow_id)}


def make_node(client, workflow_id, **values):
    """A compute node; returns its id."""
    return client.post("/compute_nodes", {
        "workflow_id": workflow_id, "hostname": "here", "pid": 1, "num_cpus": 2, "memory_gb": 4.0,
        "start_time": torc.iso_time(time.time()), "num_gpus": 0, "num_nodes": 1,
        "compute_node_type": "local", "is_active": True, **values})["id"]


def complete(client, job_id, workflow_id, node_id, code=0, status=None, run_id=1, attempt=1):
    """Complete a job by upstream's endpoint."""
    status = status or ("completed" if code == 0 else "failed")
    return client.post(f"/jobs/{job_id}/complete_job/{status}/{run_id}", {
        "job_id": job_id, "workflow_id": workflow_id, "run_id": run_id, "attempt_id": attempt,
        "compute_node_id": node_id, "return_code": code, "exec_time_minutes": 0.5,
        "completion_time": torc.iso_time(0), "status": status})


def end_jobs(client, workflow_id, ids, **codes):
    """Complete jobs, given as name=return code, on one compute node; returns its id."""
    node = make_node(client, workflow_id)
    for name, code in codes.items():
        complete(client, ids[name], workflow_id, node, code)
    return node


class Conversation:
    """A runner's side of runner_step, driven by hand."""

    def __init__(self, client, workflow_id, **node):
        self.client, self.workflow_id = client, workflow_id
        self.node = make_node(client, workflow_id, **node)
        self.number = 0
        self.held = {}                    # job id: job

    def step(self, completions=(), limit=0, repeat=False, **more):
        """One step; claimed jobs are held, completed ones no longer."""
        self.number += not repeat
        for done in completions:
            self.held.pop(done["job_id"], None)
        answer = self.client.post(f"/workflows/{self.workflow_id}/runner_step", {
            "compute_node_id": self.node, "step": self.number, "completions": list(completions),
            "held": [[job["id"], job["attempt_id"]] for job in self.held.values()],
            "claim": {"limit": limit} if limit else None, **more})
        self.held.update({job["id"]: job for job in answer["jobs"]})
        return answer

    def done(self, job, code=0, **more):
        """The completion of a job."""
        return {"job_id": job["id"], "run_id": job["run_id"], "attempt_id": job["attempt_id"],
                "status": "completed" if code == 0 else "failed", "return_code": code,
                "exec_time_minutes": 0.1, "completion_time": torc.iso_time(0), **more}


# ==================================================================================================
# 1 Head
# ==================================================================================================


def test_no_name_is_defined_twice():
    for source in (SOURCE, Path(__file__).read_text(encoding="utf-8")):
        names = [node.name for node in ast.parse(source).body
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert sorted(set(names)) == sorted(names)


def test_the_map_in_the_docstring_matches_the_banners():
    mapped = re.findall(r"^ +(\d+) (\w+(?: \w+)*?)(?: {2,}|$)",
                        torc.__doc__.split("Map of this file")[1], re.M)
    assert mapped == re.findall(r"^# =+\n# (\d+) (.+)\n# =+$", SOURCE, re.M)


def section_starts():
    """Line numbers at which sections begin."""
    return [SOURCE.count("\n", 0, match.start()) + 1
            for match in re.finditer(r"^# =+\n# \d+ .+\n# =+$", SOURCE, re.M)]


def defined_names(tree):
    """Top-level names and the line where each is defined first."""
    names = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.setdefault(node.name, node.lineno)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        names.setdefault(name.id, node.lineno)
    return names


def global_uses(table):
    """(line where the function begins, name) of all global names that functions use."""
    for child in table.get_children():
        if child.get_type() == "function":
            for symbol in child.get_symbols():
                if symbol.is_global() and symbol.is_referenced():
                    yield child.get_lineno(), symbol.get_name()
        yield from global_uses(child)


def test_code_uses_only_what_stands_in_its_section_or_above():
    names, starts = defined_names(ast.parse(SOURCE)), section_starts()
    section = lambda line: sum(start <= line for start in starts)  # noqa: E731
    below = [f"line {line}: {name}" for line, name in
             global_uses(symtable.symtable(SOURCE, "torc.py", "exec"))
             if name in names and section(names[name]) > section(line)
             and name not in ("DASH_HTML", "DASH_CSS", "DASH_JS")]         # data, which 12 serves
    assert below == []


def test_the_api_has_no_sql():
    """It asks the operations of the store, the engine, views and access."""
    api = SOURCE.partition("\n# 9 API\n")[2].partition("\n# 10 Client\n")[0]
    tree = ast.parse(api.partition("\n\n\n")[2].rpartition("\n\n\n")[0])
    strings = [node.value for node in ast.walk(tree)
               if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert len(strings) > 100
    assert [one for one in strings if re.search(
        r"\b(SELECT|UPDATE|INSERT|WHERE|DELETE FROM|json_each)\b|[a-z_]+ (=|IN|IS|<|>) \?", one)] == []
    assert re.findall(r"\bstore\.(?:query|one|bulk|execute|insert)\w*\(", api) == []


def test_bottle_and_waitress_are_never_imported_at_column_0():
    assert not re.search(r"^(import|from) (bottle|waitress|yaml)", SOURCE, re.M)


def test_the_file_parses_as_python_3_9():
    ast.parse(SOURCE, feature_version=(3, 9))


def test_lines_are_not_longer_than_100_characters():
    code = SOURCE.partition("\nDASH_HTML = ")[0]
    long = [number for number, line in enumerate(code.splitlines(), 1) if len(line) > 100]
    assert long == []


# ==================================================================================================
# 2 Errors and values
# ==================================================================================================


@pytest.mark.parametrize("text, size", [
    ("512", 512), ("1k", 1024), ("2M", 2 * 2**20), (" 3g ", 3 * 2**30), ("1t", 2**40), ("0", 0)])
def test_memory_sizes_are_read(text, size):
    assert torc.parse_memory(text) == size


@pytest.mark.parametrize("text", ["1.5g", "1gb", "1 GiB", "-1", "", "g", "9999999t", 5, None])
def test_bad_memory_sizes_are_refused_with_their_text(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        torc.parse_memory(text)


@pytest.mark.parametrize("text, seconds", [
    ("PT0S", 0), ("PT90M", 5400), ("P1DT2H", 93600), ("P0DT1M", 60), ("P2W", 1_209_600),
    ("P1Y", 31_557_600), ("P1M", 2_629_800), ("PT1.9S", 1), ("P0003-01-02T01:02:03", 97_479_123)])
def test_durations_are_read(text, seconds):
    assert torc.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["P", "PT", "pt1h", "PT90", "PT1Hjunk", "1h", "", None])
def test_bad_durations_are_refused_with_their_text(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        torc.parse_duration(text)


@pytest.mark.parametrize("seconds, text", [
    (0, "0.0s"), (-0.001, "0.0s"), (9.94, "9.9s"), (9.97, "10s"), (200, "3m20s"),
    (7500, "2h05m"), (273600, "3d04h")])
def test_durations_are_written_for_people(seconds, text):
    assert torc.format_duration(seconds) == text


def test_a_wrong_name_suggests_the_nearest():
    assert torc.did_you_mean("jbos", ["jobs", "files"]) == ' (did you mean "jobs"?)'
    assert torc.did_you_mean("zzz", ["jobs", "files"]) == ""


# ==================================================================================================
# 4 Workflow specification
# ==================================================================================================

# File name, text, and the sentences it gives; one that ends in ... is the beginning, because the
# parser's own words behind it differ between versions.
BAD_TEXTS = (
    ("b.yaml", "", "b.yaml: the file is empty"),
    ("b.yaml", "   \n", "b.yaml: the file is empty"),
    ("b.yaml", "- a\n- b\n",
     "b.yaml: the specification is a list, not a mapping with name and jobs"),
    ("b.yaml", "just a text",
     "b.yaml: the specification is a string, not a mapping with name and jobs"),
    ("b.yaml", "name: w\njobs: [\n", "b.yaml line 3: not YAML:..."),
    ("b.yaml", "name: w\n\tjobs: []\n", "b.yaml line 2: not YAML:..."),
    ("b.yaml", "name: w\nname: v\njobs: []\n",
     'b.yaml line 2: not YAML: the key "name" occurs twice'),
    ("b.yaml", "name: !!python/object:os.system x\njobs: []\n", "b.yaml line 1: not YAML:..."),
    ("b.yaml", "name: w\njobs: []\n---\nname: v\n", "b.yaml line 3: not YAML:..."),
    ("b.json", '{"name": "w",\n "jobs": [,]}', "b.json line 2: not JSON:..."),
    ("b.json", '{"name": "w", "name": "v", "jobs": []}',
     'b.json: the key "name" occurs twice in one object'),
    ("b.json", '{"name": "w", "jobs": [], "metadata": {"x": NaN}}', "b.json: NaN is not JSON"),
    ("b.kdl", 'name "w"', "b.kdl: KDL is not supported yet: convert it to YAML or JSON"),
    ("b.json5", "{name: 'w'}", "b.json5: JSON5 is not supported yet: convert it to YAML or JSON"),
    ("b.yaml", 'jobs:\n  - {name: a, command: "true"}\n', "b.yaml: workflow: missing field `name`"),
    ("b.yaml", "name: w\n", "b.yaml: workflow: missing field `jobs`"),
    ("b.yaml", 'name: 5\njobs:\n  - {name: a, command: "true"}\n',
     "b.yaml line 1: workflow: name: 5 is not a non-empty string"),
    ("b.yaml", "name: w\njobs: {a: 1}\n", "b.yaml line 2: workflow: jobs: {'a': 1} is not a list"),
    ("b.yaml", "name: w\njobs:\n  - name: a\n    comand: c\n",
     "b.yaml line 4: job \"a\": unknown field 'comand' (did you mean \"command\"?)\nb.yaml line "
     '3: job "a": missing field `command`'),
    ("b.json", '{"name": "w",\n "jobs": [\n  {"name": "a", "command": "c"},\n  {"name": "b", '
     '"command": "c",\n   "depends_on": ["zz"]}]}',
     "b.json line 5: job \"b\": depends_on names no job 'zz'"),
    ("b.yaml", "name: w\nparameters: {count: '1:3'}\njobs:\n  - name: a_{cuont}\n    command: c\n"
     "    use_parameters: [cuont]\n",
     "b.yaml line 6: job \"a_{cuont}\": use_parameters names no parameter 'cuont' of the "
     'workflow (did you mean "count"?)'),
    ("b.yaml", "name: w\nuser_data: [{name: u}]\njobs:\n  - name: a\n    command: echo "
     "${user_data.input.u}\n",
     'b.yaml line 5: job "a": command: ${user_data.input.u} has no data yet: let the command ask '
     "`torc user-data` for it"),
    ("b.yaml", "name: w\nfiles: [{name: f, path: f}, {name: g, path: g}]\njobs:\n  - {name: a, "
     "command: c, input_files: [f], output_files: [g]}\n  - {name: b, command: c, input_files: "
     "[g], output_files: [f]}\n",
     "b.yaml line 5: jobs depend on each other in a circle: b -> a -> b"),
    ("b.yaml", "name: w\nfiles: [{name: f, path: f}]\njobs:\n  - {name: a, command: c, "
     "input_files: [f], output_files: [f]}\n",
     "b.yaml line 4: jobs depend on each other in a circle: a -> a"),
    ("b.yaml", "name: w\nresource_requirements: [{name: r, num_cpus: 1, memory: 2g, runtime: "
     "PT2H}]\nslurm_schedulers: [{name: s, account: x, walltime: '01:00:00', mem: 1g}]\njobs:\n"
     "  - {name: a, command: c, resource_requirements: r, scheduler: s}\n",
     'b.yaml line 5: job "a": runtime PT2H is longer than the walltime 01:00:00 of scheduler '
     '"s"\nb.yaml line 5: job "a": memory 2g is more than the mem 1g of scheduler "s"'),
)
# Lines of a workflow above its jobs, and the sentence behind "b.yaml line ".
BAD_WORKFLOW_LINES = (
    ("jbs: []", "2: workflow: unknown field 'jbs' (did you mean \"jobs\"?)"),
    ("slurm_config: {}",
     "2: workflow: unknown field 'slurm_config' (it was removed: use slurm_defaults and "
     "execution_config)"),
    ("files: f.txt", "2: workflow: files: 'f.txt' is not a list"),
    ("metadata: '{x'", "2: workflow: metadata: '{x' is not JSON"),
    ("use_pending_failed: yes", "2: workflow: use_pending_failed: 'yes' is not true or false"),
    ("compute_node_wait_for_new_jobs_seconds: -5",
     "2: workflow: compute_node_wait_for_new_jobs_seconds: -5 is not an integer of at least 0"),
    ("files:\n  - {name: f, path: x}\n  - {name: f, path: y}", '4: file name "f" is used twice'),
    ("files:\n  - {name: f}", '3: file "f": missing field `path`'),
    ("user_data:\n  - {data: 5}", "3: user data number 1: missing field `name`"),
    ("user_data:\n  - {name: u, parameters: {i: '1:2'}}",
     "3: user data \"u\": unknown field 'parameters'"),
    ("resource_requirements:\n  - {name: r, num_cpus: 1, memory: 1.5g}",
     "3: resource requirements \"r\": memory: '1.5g' is not a size such as \"500m\" or \"2g\""),
    ("resource_requirements:\n  - {name: r, num_cpus: 1, memory: 512}",
     '3: resource requirements "r": memory: 512 is not a size such as "500m" or "2g"'),
    ("resource_requirements:\n  - {name: r, num_cpus: 0, memory: 1g}",
     '3: resource requirements "r": num_cpus: 0 is not an integer of at least 1'),
    ("resource_requirements:\n  - {name: r, num_cpus: 1, memory: 1g, runtime: 1h}",
     "3: resource requirements \"r\": runtime: '1h' is not an ISO 8601 duration such as \"PT30M\""),
    ("resource_requirements:\n  - {name: r, memory: 1g}",
     '3: resource requirements "r": missing field `num_cpus`'),
    ("resource_requirements:\n  - {name: default, num_cpus: 1, memory: 1g}",
     '3: resource requirements name "default" is reserved for the ones that every workflow has'),
    ("failure_handlers:\n  - name: h\n    rules:\n      - {exit_codes: ['1']}",
     "5: failure handler \"h\" rule 1: exit_codes: ['1'] is not a list of integers"),
    ("failure_handlers:\n  - name: h\n    rules:\n      - {max_retries: 3}",
     '5: failure handler "h" rule 1: it has none of exit_codes, match_all_exit_codes and on, so '
     "it never applies"),
    ("failure_handlers:\n  - name: h\n    rules:\n      - {on: [oom], max_retries: 3, max_attempts: 3}",
     '5: failure handler "h" rule 1: max_attempts and max_retries are the same: keep one'),
    ("failure_handlers:\n  - name: h\n    rules:\n      - {on: [oom, tiemout], memory_multiplier: 2}",
     "5: failure handler \"h\" rule 1: on: ['oom', 'tiemout'] is not a list of oom, timeout, node_failure, exit_code"),
    ("slurm_schedulers:\n  - {name: s, account: a, walltime: 4 hours}",
     "3: Slurm scheduler \"s\": walltime: '4 hours' is not a time such as \"04:00:00\" or "
     '"1-12:00:00"'),
    ("slurm_schedulers:\n  - {name: s}", '3: Slurm scheduler "s": missing field `account`'),
    ("slurm_defaults: {partition: debug}",
     "2: slurm_defaults: partition is not allowed here: it belongs to a scheduler in "
     "slurm_schedulers"),
    ("actions:\n  - {trigger_type: on_start, action_type: run_commands, commands: [x]}",
     "3: action 1: trigger_type: 'on_start' is not one of on_workflow_start, "
     "on_workflow_complete, on_jobs_ready, on_jobs_complete, on_worker_start, on_worker_complete "
     '(did you mean "on_worker_start"?)'),
    ("actions:\n  - {trigger_type: on_workflow_start, action_type: run_comands, commands: [x]}",
     "3: action 1: action_type: 'run_comands' is not one of run_commands, schedule_nodes (did "
     'you mean "run_commands"?)'),
    ("actions:\n  - {trigger_type: on_workflow_start, action_type: run_commands}",
     "3: action 1: run_commands needs commands, none of them empty"),
    ("actions:\n  - {trigger_type: on_jobs_ready, action_type: run_commands, commands: [x]}",
     "3: action 1: on_jobs_ready needs jobs or job_name_regexes"),
    ("actions:\n  - {trigger_type: on_jobs_ready, action_type: run_commands, commands: [x], jobs: "
     "[b]}",
     "3: action 1: jobs names no job 'b'"),
    ("actions:\n  - {trigger_type: on_workflow_start, action_type: schedule_nodes, "
     "scheduler_type: slurm}",
     "3: action 1: schedule_nodes needs scheduler"),
    ("actions:\n  - {trigger_type: on_workflow_start, action_type: schedule_nodes, "
     "scheduler_type: slurm, scheduler: s}",
     "3: action 1: scheduler names no Slurm scheduler 's'"),
    ("resource_monitor: {granularity: fine}",
     "2: resource_monitor: granularity: 'fine' is not one of summary, time_series"),
    ("resource_monitor: {sample_interval_seconds: 0}",
     "2: resource_monitor: sample_interval_seconds: 0 is not an integer of at least 1"),
    ("execution_config: {timeout_exit_code: 999}",
     "2: execution_config: timeout_exit_code: 999 is not an exit code from 1 to 255"),
    ("execution_config: {mode: direct, srun_termination_signal: TERM@120}",
     "2: execution_config: srun_termination_signal belongs to the mode slurm, the mode is "
     "direct: use termination_signal"),
    ("execution_config: {mode: slurm, termination_signal: SIGTERM}",
     "2: execution_config: termination_signal belongs to the mode direct, the mode is slurm: use "
     "srun_termination_signal"),
    ("execution_config: {termination_signal: SIGFOO}",
     "2: execution_config: termination_signal: 'SIGFOO' is not the name of a signal such as "
     '"SIGTERM"'),
    ("execution_config: {stdio: {mode: both}}",
     "2: execution_config: stdio: mode: 'both' is not one of separate, combined, no_stdout, "
     "no_stderr, none"),
)
# What stands behind the "- " of the first job on line 3, and the sentence behind "b.yaml line ".
BAD_JOBS = (
    ("a", "3: job number 1 is 'a', not a mapping"),
    ("{name: a}", '3: job "a": missing field `command`'),
    ("{command: c}", "3: job number 1: missing field `name`"),
    ("name: a\n    command: ''", "4: job \"a\": command: '' is not a non-empty string"),
    ("{name: prepare, command: c}\n  - name: b\n    command: c\n    depends_on: [prepar]",
     "6: job \"b\": depends_on names no job 'prepar' (did you mean \"prepare\"?)"),
    ("{name: a, command: c}\n  - {name: a, command: c}", '4: job name "a" is used twice'),
    ("name: a\n    command: c\n    resource_requirements: smal\nresource_requirements:\n  - "
     "{name: small, num_cpus: 1, memory: 1m}",
     "5: job \"a\": resource_requirements names no resource requirements 'smal' (did you mean "
     '"small"?)'),
    ("name: a\n    command: c\n    depends_on_regexes: ['a']",
     "3: jobs depend on each other in a circle: a -> a"),
    ('{name: a, command: "echo ${file.output.z}"}',
     '3: job "a": command: ${file.output.z} is not one of ${files.input.NAME}, '
     "${files.output.NAME}, ${user_data.input.NAME}, ${user_data.output.NAME}, or ${files.input}, ${files.output} of a "
     "job that lists such files"),
    ('{name: a, command: "echo ${files.output.z"}',
     '3: job "a": command: ${files.output.z is not one of ${files.input.NAME}, '
     "${files.output.NAME}, ${user_data.input.NAME}, ${user_data.output.NAME}, or ${files.input}, ${files.output} of a "
     "job that lists such files"),
    ("name: a_{i}\n    command: c\n    parameters: {i: '5:1'}",
     "5: job \"a_{i}\": parameter i: '5:1' is empty: from 5 to 1 the step must be negative"),
    ("name: a_{i}\n    command: c\n    parameters: {i: '1:5:0'}",
     "5: job \"a_{i}\": parameter i: '1:5:0' has the step 0"),
    ("name: a_{i}\n    command: c\n    parameters: {i: []}",
     '5: job "a_{i}": parameter i: is an empty list'),
    ("name: a_{i}\n    command: c\n    parameters: {i: {x: 1}}",
     "5: job \"a_{i}\": parameter i: {'x': 1} is neither a list, a string nor a number"),
    ("name: a_{i}_{j}\n    command: c\n    parameters: {i: '1:3', j: '1:2'}\n    parameter_mode: "
     "zip",
     '3: job "a_{i}_{j}": parameter_mode zip needs lists of one length: i has 3 values, j has 2 '
     "values"),
    ("name: a_{i}_{j}\n    command: c\n    parameters: {i: '1:3', j: [1]}\n    parameter_mode: zip",
     '3: job "a_{i}_{j}": parameter_mode zip needs lists of one length: i has 3 values, j has 1 value'),
    ("name: a_{i}\n    command: c\n    parameters: {i: '1:3'}\n    parameter_mode: cross",
     "6: job \"a_{i}\": parameter_mode: 'cross' is not one of product, zip"),
    ("name: a_{j}\n    command: c\n    parameters: {i: '1:3'}",
     '3: job "a_{j}": name: {j} is not a parameter of this job'),
    ("name: a\n    command: c {i}\n    parameters: {i: '1:3'}",
     '4: job "a": command differs between combinations of parameters that all give the name '
     "'a': add the placeholder to the name"),
    ("name: 'a_{i:03d}'\n    command: c\n    parameters: {i: [x, y]}",
     "3: job \"a_{i:03d}\": name: {i:03d} does not fit the value 'x'"),
    ("name: a_{i}\n    command: c\n    parameters: {i: '1:9999999'}",
     "5: job \"a_{i}\": parameter i: '1:9999999' has 9,999,999 values, more than 1,000,000"),
    ("name: a\n    command: cat ${files.input.nope}", "4: job \"a\": command names no file 'nope'"),
    ("{name: a, command: c, depends_on: [b]}\n  - {name: b, command: c, depends_on: [a]}",
     "4: jobs depend on each other in a circle: b -> a -> b"),
    ("{name: a, command: c, depends_on: [a]}", "3: jobs depend on each other in a circle: a -> a"),
    ("{name: a, command: c, stdio: {mode: all}}",
     "3: job \"a\": stdio: mode: 'all' is not one of separate, combined, no_stdout, no_stderr, "
     "none"),
)
# A line of job "a" below its command, which is line 5, and what is said of that job.
BAD_JOB_LINES = (
    *((f"env: {{{name}: {value}}}", f"env: {name}: {shown} is not a string (quote it) under a name of letters, digits "
       "and _ without TORC_ in front") for name, value, shown in (
           ("A b", "c", "'c'"), ("TORC_JOB_ID", "c", "'c'"), ("A", "1.10", "1.1"), ("é", "c", "'c'"))),
    ("limits: [io]", 'limits: it asks for {"io":1}, the workflow has {}'),
    ("limits: {io: 0}", "limits: io: 0 is not an integer of at least 1 under a name without blanks and ="),
    ("env: [A]", "env: ['A'] is not an object"),
    ("invocation_script: cat ${files.input} |", "invocation_script: ${files.input} is not one of ${files.input.NAME}, "
     "${files.output.NAME}, ${user_data.input.NAME}, ${user_data.output.NAME}, or ${files.input}, ${files.output} of a "
     "job that lists such files"),
    ("priority: -1", "priority: -1 is not an integer of at least 0"),
    ("priority: 1.5", "priority: 1.5 is not an integer of at least 0"),
    ("timeout: PT0.5S", "timeout: 'PT0.5S' is not an ISO 8601 duration of at least a second such as \"PT30M\""),
    ("depends_on: b", "depends_on: 'b' is not a list of strings"),
    ("input_files: [nope]", "input_files names no file 'nope'"),
    ("output_user_data: [nope]", "output_user_data names no user data 'nope'"),
    ("scheduler: s", "scheduler names no Slurm scheduler 's'"),
    ("failure_handler: h", "failure_handler names no failure handler 'h'"),
    ("depends_on_regexes: ['^q']", "depends_on_regexes: '^q' matches no job"),
    ("depends_on_regexes: ['(']",
     "depends_on_regexes: '(' is not a valid regular expression: missing ), unterminated "
     "subpattern at position 0"),
)
BAD_SPECS = (
    *BAD_TEXTS,
    *(("b.yaml", f'name: w\n{lines}\njobs:\n  - {{name: a, command: "true"}}\n',
       f"b.yaml line {said}") for lines, said in BAD_WORKFLOW_LINES),
    *(("b.yaml", f"name: w\njobs:\n  - {jobs}\n", f"b.yaml line {said}")
      for jobs, said in BAD_JOBS),
    *(("b.yaml", f"name: w\njobs:\n  - name: a\n    command: c\n    {line}\n",
       f'b.yaml line 5: job "a": {said}') for line, said in BAD_JOB_LINES),
)


@pytest.mark.parametrize("name, text, message", BAD_SPECS)
def test_a_broken_spec_is_told_in_an_exact_sentence(name, text, message):
    with pytest.raises(torc.SpecError) as caught:
        torc.read_spec(name, text)
    if message.endswith("..."):
        assert str(caught.value).startswith(message[:-3])
    else:
        assert str(caught.value) == message


def test_a_broken_spec_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, (name, text, _) in enumerate(BAD_SPECS):
        path = tmp_path / f"{number}{os.path.splitext(name)[1]}"
        path.write_text(text)
        assert torc.main(["create", str(path), "--database", "x.db"]) == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said and str(number) in said
    client = torc.LocalClient("x.db")
    assert client.page("/workflows")["total_count"] == 0
    assert client.post("/workflows", {"name": "first", "user": "u"})["id"] == 1
    client.close()


def test_all_errors_are_told_together():
    with pytest.raises(torc.SpecError) as caught:
        torc.read_spec("b.yaml", "nam: w\njobs:\n  - {name: a, command: 5}\n  - {name: a}\n")
    assert len(caught.value.errors) == 5


@pytest.mark.parametrize("make_bad, message", [
    (lambda path: None, "No such file or directory"), (lambda path: path.mkdir(), "Is a directory"),
    (lambda path: path.write_bytes(b"name: \xff\xfe"), "not UTF-8 text"),
])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, make_bad, message):
    make_bad(tmp_path / "s.yaml")
    with pytest.raises(torc.SpecError, match=message) as caught:
        torc.read_spec(str(tmp_path / "s.yaml"))
    assert len(caught.value.errors) == 1


def spec_jobs(text):
    """The jobs of a YAML spec by name."""
    jobs = torc.read_spec("s.yaml", "name: w\n" + textwrap.dedent(text)).payload["jobs"]
    return {job["name"]: job for job in jobs}


def after(jobs, name):
    """Names of the jobs that one of spec_jobs() depends on."""
    return [list(jobs)[other - 1] for other in jobs[name]["depends_on_job_ids"]]


JOB = "name: w\njobs: [{name: a, command: x}]\n"
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{number}: &a{number} [{','.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 10))


@pytest.mark.parametrize("text, sentence", [
    ('{"name": "w", "jobs": [], "metadata": {"x": 1e400}}', "metadata.x: inf is a number that JSON does not have"),
    ('{"name": "w", "jobs": [{"name": "\\ud800", "command": "c"}]}', "jobs.0.name: '.ud800' is text that is not"),
    (JOB + "user_data: [{name: u, data: [1e999]}]", "user_data.0.data.0: inf is a number that JSON does not have"),
    (JOB + "user_data:\n  - name: u\n    data:\n      ? [a, b]\n      : c\n", "line 6: not YAML: a key is not a string"),
    (JOB + "user_data: [{name: u, data: !!int foo}]", "line 3: not YAML: foo cannot be read as int"),
    (JOB + "user_data: [{name: u, data: !!binary aGVsbG8=}]", "b'hello' is binary, which JSON does not have"),
    (JOB + "user_data: [{name: u, data: !!set {a}}]", "{'a'} is a set, which JSON does not have: quote it"),
    (JOB + "user_data: [{name: u, data: !!timestamp 2026-01-01}]", "is a date, which JSON does not have: quote it"),
    (JOB + "metadata: &m\n  x: *m\n", "is nested more than 60 deep"),
    (JOB + "metadata:\n" + textwrap.indent(BOMB, "  "), r"its aliases .&name, .name. stand for more than 12\d,\d+ values"),
    ("name: w\njobs: [{name: a, command: c, parameters: {1: [1, 2]}}]", "the key 1 is not a string: quote it"),
    ("name: w\njobs: [{name: 'a_{i}_{j}_{k}', command: c, parameters: {i: '1:1000', j: '1:1000', k: '1:1000'}}]",
     "1,000,000,000 combinations of parameters, more than 1,000,000"),
    ("name: w\njobs:\n" + "".join(f"  - {{name: 'a{n}_{{i}}', command: c, parameters: {{i: '1:1000000'}}}}\n"
                                  for n in range(2)), "jobs: 2,000,000 combinations of parameters in total"),
    ("name: w\njobs: [{name: 'a_{x}', command: c, parameters: {x: '[1,2,]'}}]", "has an empty value after its last comma"),
    ("name: w\njobs: [{name: 'a_{x}', command: c, parameters: {x: '[1,,2]'}}]", "has an empty value"),
    ("name: w\njobs: [{name: 'a_{i}', command: 'x {i+1}', parameters: {i: '1:2'}}]", r"{i\+1} is left as it is"),
    ("name: w\njobs: [{name: 'a_{i}', command: 'x { i!r }', parameters: {i: '1:2'}}]", "{ i!r } is left as it is"),
    ("name: w\nparameters: {i: '1:2'}\njobs: [{name: a, command: 'x {i}'}]", "{i} is left as it is"),
    (JOB + "files: [{name: f, path: p}]\nactions: [{trigger_type: on_workflow_start, action_type: run_commands,"
     " commands: ['cat ${files.input.g}']}]", "commands names no file 'g'"),
])
def test_what_could_not_be_done_as_it_says_is_refused(text, sentence):
    started = time.monotonic()
    with pytest.raises(torc.SpecError, match=sentence):
        torc.read_spec("s.json" if text[0] == "{" else "s.yaml", text)
    assert time.monotonic() - started < 20


def test_integers_of_thousands_of_digits_are_told():
    for name, text in (("s.yaml", JOB + f"user_data: [{{name: u, data: {'9' * 5000}}}]"),
                       ("s.json", f'{{"name": "w", "jobs": [], "user_data": [{{"name": "u", "data": {"9" * 5000}}}]}}')):
        if not hasattr(sys, "set_int_max_str_digits"):       # where Python has no limit of its own
            assert torc.read_spec(name, text).payload["user_data"][0]["data"] == int("9" * 5000)
        else:
            with pytest.raises(torc.SpecError, match="digits|cannot be read as int"):
                torc.read_spec(name, text)


@pytest.mark.slow
def test_what_explodes_is_refused_in_little_memory_and_time(tmp_path):
    texts = {"bomb.yaml": JOB + "metadata:\n" + textwrap.indent(BOMB, "  "),
             "many.yaml": "name: w\njobs:\n" + "".join(
                 f"  - {{name: 'a{n}_{{i}}', command: c, parameters: {{i: '1:1000000'}}}}\n" for n in range(3)),
             "regex.yaml": "name: w\njobs:\n  - {name: " + "a" * 40 + "b, command: c}\n"
                           "  - {name: z, command: c, depends_on_regexes: ['^(a+)+$']}\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        done = subprocess.run([PYTHON, "-c", MEASURED, "create", "--dry-run", name], cwd=tmp_path, timeout=60,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert "more than" in done.stdout + done.stderr, done
        assert int(done.stdout.split("PEAK")[1]) < 200


def test_a_circle_of_forty_thousand_jobs_names_ten_of_them():
    jobs = [{"name": f"j{number}", "command": "c", "depends_on": [f"j{(number + 1) % 40_000}"]}
            for number in range(40_000)]
    with pytest.raises(torc.SpecError) as caught:
        torc.read_spec("s.json", json.dumps({"name": "w", "jobs": jobs}))
    assert len(re.findall(r"\bj\d+", str(caught.value))) == 10 and "39,991 more" in str(caught.value)


def test_parameters_of_any_name_are_put_in():
    jobs = spec_jobs("""
        jobs:
          - name: "a_{learning-rate}_{a.b}"
            command: "x {learning-rate} {a.b:.2f} ${learning-rate} '{\\"a.b\\":1}'"
            parameters: {learning-rate: [0.1, 0.2], a.b: 1.5}
        """)
    assert {name: job["command"] for name, job in jobs.items()} == {
        "a_0.1_1.5": "x 0.1 1.50 ${learning-rate} '{\"a.b\":1}'",
        "a_0.2_1.5": "x 0.2 1.50 ${learning-rate} '{\"a.b\":1}'"}


@pytest.mark.parametrize("values, texts", [
    ("\"['a,b','c']\"", ["a,b", "c"]), ("'[\"a\", b c]'", ["a", "b c"]), ("[true, false]", ["true", "false"]),
    ("'1e-16:5e-16:2e-16'", ["1e-16", "3e-16", "5e-16"]), ("'0:0.3:0.1'", ["0", "0.1", "0.2", "0.3"]),
    ("'5:1:-2'", ["5", "3", "1"]), ("'[1, 2.5]'", ["1", "2.5"]), ("x", ["x"]), ("'{1:3}'", ["1", "2", "3"])])
def test_each_value_of_a_parameter_is_written_as_it_was_meant(values, texts):
    assert [job["command"] for job in spec_jobs(f"""
        jobs: [{{name: "a_{{x}}", command: "{{x}}", parameters: {{x: {values}}}}}]
        """).values()] == texts


def test_commands_of_actions_know_the_files():
    spec = torc.read_spec("s.yaml", JOB + "files: [{name: f, path: out.txt}]\nactions: [{trigger_type: "
                          "on_workflow_complete, action_type: run_commands, commands: ['cat ${files.output.f}']}]")
    assert spec.payload["actions"][0]["action_config"] == {"commands": ["cat out.txt"]}


@pytest.mark.parametrize("merges, command, priority", [
    ("<<: [*x, *y]", "one", 1), ("<<: [*y, *x]", "two", 2), ("<<: *x\n    <<: *y", "one", 1),
    ("command: own\n    <<: [*x, *y]", "own", 1), ("<<: *z", "three", 1), ("<<: [*y, *z]", "two", 2),
    ("<<: *x\n    command: own", "own", 1)])
def test_of_merged_keys_the_first_wins_and_own_ones_override(merges, command, priority):
    [job] = torc.read_spec("s.yaml", f"""name: w
metadata:
  x: &x {{command: one, priority: 1}}
  y: &y {{command: two, priority: 2}}
  z: &z {{<<: *x, command: three}}
jobs:
  - name: a
    {merges}
""").payload["jobs"]
    assert (job["command"], job["priority"]) == (command, priority)


def test_yaml_is_read_by_the_core_schema_of_1_2():
    spec = torc.read_spec("s.yaml", "name: no\njobs: []\ndescription: 12:30\nmetadata:\n  a: 010\n"
                          "  b: 0o17\n  c: 1e3\n  d: yes\n  e: ~\n  f: 2024-01-01\n  g: 0x1F\n")
    workflow = spec.payload["workflow"]
    assert workflow["name"] == "no" and workflow["description"] == "12:30"
    assert json.loads(workflow["metadata"]) == {
        "a": 10, "b": 15, "c": 1000.0, "d": "yes", "e": None, "f": "2024-01-01", "g": 31}


@pytest.mark.parametrize("value, expected", [
    ("1:5", [1, 2, 3, 4, 5]), ("0:100:50", [0, 50, 100]), ("5:1:-2", [5, 3, 1]), ("{1:3}", [1, 2, 3]),
    ("0.0:0.3:0.1", [0.0, 0.1, 0.2, 0.3]), ("1.0:2.0", [1.0, 2.0]), ("[1,2]", [1, 2]),
    ("[0.1,0.5]", [0.1, 0.5]), ("['a','b']", ["a", "b"]), ("x", ["x"]), (7, [7]), (["a", 1], ["a", 1]),
    ("0.0001:0.01:10", [0.0001]), ("3:3", [3]), ("a:b", ["a:b"]),
    ("010", ["010"]), ("[01,02]", ["01", "02"]), ("0.10:0.30:0.10", [0.1, 0.2, 0.3])])
def test_parameters_stand_for_their_values(value, expected):
    assert torc.parameter_values(value) == expected


def test_a_long_list_in_a_string_is_read_in_time_that_grows_with_it():
    assert len(torc.parameter_values(str(["a"] * 300_000))) == 300_000


@pytest.mark.parametrize("text, expected", [
    ("{i:03d}_{i}_{x:.2f}", "007_7_0.50"), ("${i} {i}", "${i} 7"), ("{other} {i}", "{other} 7"),
    ("awk '{print $1}'", "awk '{print $1}'"), ("{one}", "1"), ("{s:>5}", "    t")])
def test_no_placeholder_of_a_text_stays_half_expanded(text, expected):
    assert torc.substitute(text, {"i": 7, "x": 0.5, "one": 1.0, "s": "t"}) == expected


def test_shared_and_local_parameters_are_merged_and_local_ones_win():
    jobs = spec_jobs("""
        parameters: {i: "1:2", k: [far]}
        jobs:
          - {name: "{i}{k}", command: "echo {k}", use_parameters: [i, k], parameters: {k: [near]}}
        """)
    assert list(jobs) == ["1near", "2near"] and jobs["1near"]["command"] == "echo near"


@pytest.mark.parametrize("text, names, waits", [
    ("""
        parameters: {x: [c, "c++", c.d]}
        jobs:
          - {name: "prep_{x}", command: c, use_parameters: [x]}
          - {name: "run_{x}", command: c, use_parameters: [x], depends_on_regexes: ["^prep_{x}$"]}
     """, None, {f"run_{name}": [f"prep_{name}"] for name in ("c", "c++", "c.d")}),
    ("""
        jobs:
          - {name: "{b}{a}", command: c, parameters: {a: "1:2", b: [x, y]}}
          - {name: "z{b}{a}", command: c, parameters: {a: "1:2", b: [x, y]}, parameter_mode: zip}
     """, ["x1", "y1", "x2", "y2", "zx1", "zy2"], {}),
    ("""
        parameters: {i: "1:3"}
        jobs:
          - {name: "p_{i}", command: c, use_parameters: [i]}
          - {name: agg, command: c, use_parameters: [i], depends_on: ["p_{i}"]}
     """, ["p_1", "p_2", "p_3", "agg"], {"agg": ["p_1", "p_2", "p_3"]}),
    ("""
        jobs:
          - {name: "p_{i}_{j}", command: c, parameters: {i: "1:2", j: "1:2"}}
          - {name: "row_{i}", command: c, parameters: {i: "1:2", j: "1:2"},
             depends_on: ["p_{i}_{j}"]}
     """, None, {"row_2": ["p_2_1", "p_2_2"]}),
    ("""
        jobs:
          - {name: "p_{i}", command: c, parameters: {i: "1:12"}}
          - {name: last, command: c, depends_on_regexes: ["p_1", "_2$"]}
     """, None, {"last": ["p_1", "p_10", "p_11", "p_12", "p_2"]}),
], ids=["values_are_no_regular_expressions", "order_of_combinations_is_not_random",
        "fan_in_job_is_not_copied", "name_that_varies_in_part_gathers_the_rest",
        "regexes_are_searched_in_the_names"])
def test_jobs_have_the_names_and_dependencies_that_are_meant(text, names, waits):
    jobs = spec_jobs(text)
    assert names in (None, list(jobs))
    assert {name: after(jobs, name) for name in waits} == waits


def test_variables_do_not_drop_the_explicit_lists():
    spec = torc.read_spec("s.yaml", textwrap.dedent("""
        name: w
        files: [{name: a, path: pa}, {name: b, path: pb}, {name: out, path: po}]
        user_data: [{name: u, data: {x: [1, 2]}}]
        jobs:
          - name: j
            command: cat ${files.input.a} > ${files.output.out}; echo '${user_data.input.u}' ${HOME}
            invocation_script: with ${files.input.b}
            input_files: [b]
        """))
    [job] = spec.payload["jobs"]
    assert job["command"] == "cat pa > po; echo '{\"x\":[1,2]}' ${HOME}"
    assert job["invocation_script"] == "with pb"
    assert (job["input_file_ids"], job["output_file_ids"], job["input_user_data_ids"]) == ([2, 1], [3], [1])


def test_all_files_of_a_job_stand_in_its_command_in_declared_order():
    spec = torc.read_spec("s.yaml", textwrap.dedent("""
        name: w
        parameters: {i: "1:2"}
        files:
          [{name: a, path: pa}, {name: b, path: it's}, {name: "f{i}", path: "$p{i}", use_parameters: [i]}, {name: o, path: po}]
        jobs:
          - name: j
            use_parameters: [i]
            command: test ${files.input.a}; cat ${files.input} > ${files.output.o}
            input_files: ["f{i}", b]
            input_file_regexes: ["f1", "^b"]
            output_files: [o]
            invocation_script: touch ${files.output};
        """))
    [job] = spec.payload["jobs"]
    assert job["command"] == "test pa; cat '$p1' '$p2' 'it'\"'\"'s' > po"
    assert (job["input_file_ids"], job["output_file_ids"]) == ([3, 4, 2, 1], [5])
    assert job["invocation_script"] == "touch po;"


def test_a_monitor_section_without_enabled_does_not_turn_monitoring_off():
    spec = torc.read_spec("s.yaml", "name: w\njobs: []\nresource_monitor: {granularity: TimeSeries}\n")
    assert json.loads(spec.payload["workflow"]["resource_monitor_config"]) == {
        "enabled": True, "granularity": "time_series"}


def test_jobs_that_do_not_fit_their_scheduler_can_be_let_through():
    name, text, _ = next(row for row in BAD_SPECS if "longer than the walltime" in row[2])
    assert len(torc.read_spec(name, text, skip_checks=True).warnings) == 2


def test_what_seems_odd_is_a_warning():
    text = ("name: w\nfiles: [{name: f, path: f}]\njobs:\n"
            "  - {name: a, command: c, output_files: [f]}\n  - {name: b, command: c, output_files: [f]}\n")
    assert torc.read_spec("s.yaml", text).warnings == ['file "f" is written by 2 jobs (a, b)']
    assert torc.read_spec("s.yaml", "name: w\njobs: []\n").warnings == ["the workflow has no jobs"]


def test_modification_times_of_existing_files_are_taken_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    spec = torc.read_spec("s.json", json.dumps({"name": "w", "jobs": [], "files": [
        {"name": "here", "path": "here"}, {"name": "gone", "path": "gone"}]}))
    assert spec.payload["files"] == [
        {"name": "here", "path": "here", "st_mtime": os.stat("here").st_mtime},
        {"name": "gone", "path": "gone"}]


@pytest.mark.parametrize("text, seconds", [("30", 1800), ("30:15", 1815), ("04:00:00", 14400),
                                           ("1-12", 129600), ("2-00:30", 174600),
                                           ("1-12:00:01", 129601)])
def test_slurm_times_are_read(text, seconds):
    assert torc.parse_walltime(text) == seconds


@pytest.mark.parametrize("name", sorted(torc.SPEC_EXAMPLES))
def test_the_built_in_specs_are_valid(name):
    assert torc.read_spec(f"{name}.json", torc.SPEC_EXAMPLES[name]).warnings == []


@pytest.mark.parametrize("name, text", [("s.yaml", "name: a\n# \ud800\njobs: []"), ("s.json", '{"name":\n"\ud800"}')])
def test_half_a_letter_in_a_specification_is_named_with_its_line(name, text):
    with pytest.raises(torc.SpecError, match=rf"{name} line 2: '.ud800' is text that is not Unicode"):
        torc.read_spec(name, text)


def test_what_is_empty_in_a_specification_is_as_if_it_were_not_there(store, api):
    text = {"name": "w", "jobs": [{"name": "a", "command": "true", "invocation_script": "", "depends_on": []}],
            "actions": [{"trigger_type": "on_workflow_start", "action_type": "run_commands", "commands": ["true"],
                         "jobs": []}]}
    spec = torc.read_spec("w.json", json.dumps(text))
    assert not {"invocation_script", "depends_on_job_ids"} & set(spec.payload["jobs"][0])
    assert "job_ids" not in spec.payload["actions"][0]
    text = {"name": "w", "jobs": [{"name": "j_{a}", "command": "{a}", "parameters": {"a": "['', 'x']"}}]}
    spec = torc.read_spec("w.json", json.dumps(text))
    with pytest.raises(torc.Invalid, match="missing field `command`"):
        api.post("/workflow_specs", {**spec.payload, "workflow": {"name": "w", "user": "tester"}})


# ==================================================================================================
# 5 Store
# ==================================================================================================


def test_a_database_and_its_companions_are_readable_by_their_owner_alone(tmp_path):
    store = torc.Store(str(tmp_path / "x.db"))
    with store.transaction():
        store.execute("INSERT INTO meta VALUES ('a', 'b')")
    modes = {name.name: name.stat().st_mode & 0o777 for name in tmp_path.iterdir()}
    assert modes and set(modes.values()) == {0o600}
    store.close()


@pytest.mark.parametrize("kind", [kind for kind in torc.KINDS.values() if not kind.derive],
                         ids=lambda kind: kind.table)
def test_the_default_of_a_field_is_its_columns(store, kind):
    default = {row[1]: row[4] for row in store.query(f"PRAGMA table_info({kind.table})")}
    assert {field.name: default[field.name] for field in torc.columns(kind)
            if field.default is not None} == {
        field.name: str(int(field.default)) for field in torc.columns(kind)
        if field.default is not None}


def test_an_empty_file_is_a_valid_start(tmp_path):
    (tmp_path / "empty.db").touch()
    store = torc.Store(str(tmp_path / "empty.db"))
    assert re.fullmatch(r"[0-9a-f]{16}", store.id)
    store.close()


def test_the_id_of_a_database_survives_a_restart(tmp_path):
    first = torc.Store(str(tmp_path / "x.db"))
    second = torc.Store(str(tmp_path / "x.db"))
    assert first.id == second.id
    first.close(), second.close()


def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    path = str(tmp_path / "new.db")
    torc.Store(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(torc.Unreachable, match="made by a newer torc .its schema is 99"):
        torc.Store(path)


@pytest.mark.parametrize("version", [0, 3, 99])
def test_another_programs_database_is_refused_untouched(tmp_path, version):
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db")) as connection:
        connection.execute("CREATE TABLE mine (a)")
        connection.execute(f"PRAGMA user_version = {version}")
    before = (tmp_path / "x.db").read_bytes()
    with pytest.raises(torc.Unreachable, match="belongs to another program"):
        torc.Store(str(tmp_path / "x.db"))
    assert (tmp_path / "x.db").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_database_is_not_called_unreachable(tmp_path):
    store = torc.Store(str(tmp_path / "x.db"))
    api = torc.LocalClient(store.path, "tester", store)
    make(api, {f"j{number}": [] for number in range(2000)})
    store.execute("PRAGMA wal_checkpoint(TRUNCATE)"), store.close()
    size = (tmp_path / "x.db").stat().st_size
    with open(tmp_path / "x.db", "r+b") as file:
        file.seek(size // 4)
        file.write(b"\xff" * (size // 2))
    with pytest.raises(torc.Internal, match="x.db: database disk image is malformed"):
        torc.Store(str(tmp_path / "x.db")).query("SELECT name, command FROM job")


# SQL of such a database, compressed (xz, base85).
OLD_DATABASE = """
    T>t<81poj4|NsC0{{SHoMF`R~N0v|TDS`*&)@E@_F6_r2x38zH?RB&~ZxbFL+1Vv_Ngf8hiVP)DQJS+Ty@n;deZ}3ib}A34Ip}c4PaK}7E+k}j3l
    OZ&@5XRzQ4-h-fL6k~e#5!L6HS(%K3<6bRuejM_5{6v<NKVOuHAY+1EyIx8Xt0IaYfl#5<qkxwpXWKyYaMEJjAOg*h#*#@+_0ZAFNG}e_VUEGlf~
    N7-DyGL=tOL^#O8hJf;KRP-a(x)v#;RT;U!N8vg(B$RVpyH|3fR=`W$RJE8Q`V%0Oomc`BeZ5i)ZOd8q%$CHD!JSgCOZZPJ>)D3r~V~Kt4r#Loxz
    R9<4yaP-!V$ze^Zx)KIQPH+yB*!vWK-|z96x<V?!;J5l>p#J+y=fh-wa1ZdoqNNA3r<0Y;D0j-l8`pgzS6o5hQ2Uyof<IX7VIA7S!1&DxkP=bp2;
    nT80{Pd`8(pb1Oo$6z8!Mc0Cb(02r44dTn>Fm?UBGsc-6`I0B2K|iJdnHUxiPP$AM8a1jCO7R%eW*5Aub650ZEqNBRwdr2-UoeQy=8c=mb?4s82<
    (l;2^YrB$8;P?q8?>-=MO{d=Mfb~M7+~_)E95t4(VbxVJd&>vtGT2g;L-pbVEuaXVgcY;d2s(+uC8HUKeOAdzs$mH-?i$}aqZ&qvoJ&;@GB!c|;k
    @zeeJ=c)#8+PF4s~J>n!;ItYr-lrNBfZ1*8HfxWf&@ze~jsw3C2jCX*h`wopq6^8@(*F&Jg(ZV>o{5p2G`nSgTPw3v{n=50!>ic~C8N@^@<-E>FH
    >k}@3dG>59>4hkag{2_!6HnRx6Dys%ok7@M45P~3dXpZ!i=nYvQ;tFkj?ki9vZ=X&Y;7&^RH<XcfaD^u*#uEcS03*<8N{JmZP0g7-Q-F_g1|mM&f
    {Krt+r5(;V2<gz4H31<JA|R{WG@V`=4kV?^=zJwc#Bg(%WSwqH7O=6!0TV5cVSMJs~mS%IF&=sIv!FG8PN6#CET$CxywLmOZ{qJ!vAkCzQHQtG|y
    WZ(L7^tL=?&WiU8jRxvL~e*wYiYH{*IAh+2hMAPb3Q<ejfGmxljXm_t)SS*KFRLeq~(7WtZh!{elqA7{b6EW$xM)9G-^wWHZ4Ac8EbGWCeE3kKx-
    !6jKP)B^&%gUd1Y2%Y0Qb^U!eRUeEXVOl@ak>Vl=gQ)`zdmdg_Dp--33;%E-mq$BwZUop^)}V^^3!Sbe^iZBn*iPqh7f`o~sVzTEp&Wfw7I%ZNOZ
    `nL<u7*^i_nU{_^UhFguP<K8utwB`Uh*a_qv3U!~ktw0>i|lm1vkDsI@j7sTA0Wr+J@Fl0?~$lTqVMFY0~H{O$hw^|oDHS7$~=*!$L%fqf9*WX5|
    #MuG_^bszNmbChQdsieXqVnR-228<;!)AqfDDq*fU{KlsK{eT-xeD&aFFeZ?tbx15fxBv%vAH0CnQJacC>^2yEO(7V*w?4WPpd=1Y$9MLDGY#3dg
    `~B8uQ%Zk+>2bZY=>!MLZp=X!Ej$|HliNUPcN-$sFr8pNM@MZKYcIm6`-r1&}D9=_1@|w*V6-qvRB#Atk&0zH;;h*oa_)(o|!rL5oLpn%;mXa5oU
    |5tk5<x8GLNi5Llwssb_#B>=Le=kATHBVN$+Wu!Es#%2gNbWUNxlo!2npxj?hs?2}ImKQopZw-VIWT+%nxh*5iBG)6L}eVue<1T((3Td&qcH>Z|@
    lswm8bOw0;?%4b8T92S$f5_!(Qov|^1|_!VQ&+Ta1%l^sGY87OYWUQ25OQS1Jol>UoZhu&)nEp*fiB|m4D3=*NHJxIT{)i9EYULrVVO~}eQRLs`V
    Y5UujzEwF=O9`$vPcJ>4ACV^paM_<DB?JhH+VT0OBqQ#Kdc6TcDe669v1p-^*AWw+OK~^tm<*U5H4f9CPhTg_-8d&$rdc!k8BjxbBHm*epMO?F3D
    5futNElvX&7X-waMWzqLA&!#WCHincCwvG<B#7_fA=_(KOB|r$Rwo2+Zs*7ds)sO`RzfYk`QtzVUrl{Ic$p$`UxQivjAD0>UZbZ``CdNUZ;4RA7f
    #dSRT*WH{B!an#aeVJl7$Xeb@Nlcj{VL!LYK_83z5aV!KV?q-Eta+;yz%k~+)DIH!AMu2X2i?2g)%+R6sz)RBd|!hcMAu!^(~?m)rgD&!zbtDK^x
    7~e4!MT(gV_5`4}7r@Se!-&kI+MyDAEDd$=|5?VB%OA0KF0AXxu(OeUW?;h{D6;e-jl_|sg*VUldBz-Tg?+f5o`$g!Z>Gz4wsAyErJnn*}SZ~-yF
    Ek-qAkR4>y7Ex8N+fnZ1@1#K&#1q1DjJ~A`g!7OmLlM%DHuga5kV60`#rIpcXGS~-M_eCUp)Bzi(~vU>DLx%dP@8Cnr#~hxIyw%WObJ?`V5{c~je
    t6g-;Zp~(uh~<>D0nm(UWCc;{ie#bD70Phr4W`u636hCgtNxylM6;a#KhrX&_!D`%}PMq+8CB3-|CYUkWh?T9%BF^4DoBNlsS|ERZu<8VdV>_&`z
    ewy|h{C)U$lKM{=q<;x0J<$VLh+<AV#ji%AR)~0cb;=}$r?c;LdS|}+^N%~aK2J365HrP6wa}`7rWkDB{nP*Ukzohnq0L__X*K=b|`gyAn9nJ_<7
    f}Q<?C~k}(KoWNZ_|?Y!1NsgUBH4^xsp2d)8U$+rObCF!)EDin}!+Lv)wcyziCc4X?7AYoF!6D>2x8ZOc?grQ)ZGBSISOpPZW%WIf`qzdjiMn_7`
    0a1Ag}XQ2oKGVrX}xB_6F9075``jGYgk@!XS<|3+wZON9uc8(_WlT7zg0T3^h1ddNVVELABs7CIGL(Obyn$_v&^pi{IpOShx6_{IkAYONOH-ig`P
    !%LOys)Aw5Iz!huU!WrbOp<Z^gkBk^{%7_<*0_vf27X8*k}g_A%+yeTl<RoSqm&>!jkx;Nf5<60oI1Qtf-=s|O4JPNA?@--AfC$Bt$8XN5JNsb{L
    %A-3F?-@^AA$wn@JHw^-F2J2(d9}9F(hoZ-?74Af02O&zjuqMX1f~g_sRf<5-#*h~1js8-Ucd)q3j}HN$NJWfhKF{q#iS??wN>oq=E!B`m<^Saxc
    DVvE%Y>|Ih#iBd8b!y?OAHG9*l?Ynd{36fRe>MxSg0Weay;X2Kv$I&FC=j^~6f1Yw3Vf;3VBurA?T(@U4u@uTIgqKn@B~cE!id4;**mzWmkL;hFo
    $}AypcCPj?LO<r8EAsH$$~8Yiqo`40W6|*MerI*y(09{0_FK_HCR5T949;m<K41rp4|^i1v#rgUeuXQh7p^4hui~nmk~F(&O7hV;biMFGnD{=8VP
    7Cq@bQ@(9d*aqowzVHvJ_^+sjV#8NY<(8X=|U;pU(1J2gqO3nBO;@0YVN&xEbo&Anm}p--;X@JB)C)JpOB=Urj4UtMo@mMAzKPn!P{QB;L?&bikk
    +(<J4BKprp3V-9NiXJ4Mz`6#1PSN7?id6mZnD4$n{eP>gI}Zv&J*M!BrE025H}-)K<cJmdI7Jt{sCj8JlunJ91n6(u;XQ%4&P(QuDf@Sak;^@zzi
    KvjH5U$+ZlbYg<zx5RaeJre{b<{z`+w(Njs^C&<3*=NeQ_ZHA((-kqb;jK5ySMhRAezTsdsP(6eY!p4a6j?t%SFxN76KjUtIu(gmhP2_VEb+`{JR
    P
"""


def dump_of_the_version_before(path):
    """A database as the release before the counters wrote it: a workflow half done, with every kind of record."""
    import base64
    import lzma
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(lzma.decompress(base64.b85decode("".join(OLD_DATABASE.split()))).decode())


def test_a_database_of_the_version_before_opens_with_everything_in_it(tmp_path):
    dump_of_the_version_before(tmp_path / "old.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "old.db")) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        before = {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone() for name in tables}
    store = torc.Store(str(tmp_path / "old.db"))
    for name in set(tables) - {"latest_result", "job_input_hash", "sqlite_sequence"}:
        assert store.one(f"SELECT count(*) FROM {name}") == before[name], name
    check_store(store)
    api = torc.LocalClient(store.path, "tester", store)
    assert statuses(api, 1) == {"a": "completed", "b": "failed", "c": "canceled", "d": "ready", "e": "blocked"}
    results = api.get("/results", workflow_id=1)["items"]
    assert [(row["job_id"], row["return_code"], row["attempt_id"]) for row in results] == [(1, 0, 1), (2, 3, 2)]
    assert api.get("/results", workflow_id=1, all_runs=True)["total_count"] == before["result"][0] == 3
    [action] = api.get("/workflows/1/actions")
    assert (action["trigger_count"], action["required_triggers"]) == (1, 2)
    [lane] = api.get("/workflows/1/timeline")["runners"]
    assert [round((bar["end"] - bar["start"]) / 1000) for bar in lane["jobs"]] == [30, 60, 60]
    runner = Conversation(api, 1, num_cpus=8)
    [job] = runner.step(limit=4)["jobs"]
    assert job["name"] == "d"
    runner.step([runner.done(job)])
    assert statuses(api, 1)["e"] == "ready"
    store.close()


def test_what_changes_after_a_database_was_migrated_is_noticed(tmp_path):
    dump_of_the_version_before(tmp_path / "old.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "old.db")) as connection, connection:
        connection.execute("UPDATE job_input_user_data SET job_id = 1")        # of one that has run
    store = torc.Store(str(tmp_path / "old.db"))
    api = torc.LocalClient(store.path, "tester", store)
    assert changed(api, 1) == {}
    api.put("/user_data/1", {"data": {"x": 2}})
    assert changed(api, 1) == {"a": "its user data changed"}
    store.close()


@pytest.mark.parametrize("make_bad, message", [
    (lambda path: path.write_text("hello, I am no database at all, " * 99), "not an SQLite database"),
    (lambda path: path.mkdir(), "Is a directory"),
])
def test_what_is_no_database_is_refused_in_one_line(tmp_path, make_bad, message):
    make_bad(tmp_path / "bad")
    with pytest.raises(torc.Unreachable, match=message) as caught:
        torc.Store(str(tmp_path / "bad"))
    assert "\n" not in str(caught.value) and str(tmp_path / "bad") in str(caught.value)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(torc.Unreachable, match="No such file or directory"):
        torc.Store(str(tmp_path / "nowhere" / "x.db"))


def test_a_failed_transaction_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.execute("INSERT INTO meta VALUES ('a', 'b')")
        1 / 0
    assert store.query("SELECT * FROM meta WHERE key = 'a'") == []


def test_readers_see_only_what_is_committed(store):
    seen = []
    with store.transaction():
        store.execute("INSERT INTO meta VALUES ('a', 'b')")
        reader = threading.Thread(target=lambda: seen.append(
            store.query("SELECT * FROM meta WHERE key = 'a'")))
        reader.start(), reader.join()
    assert seen == [[]] and store.one("SELECT value FROM meta WHERE key = 'a'") == ("b",)


def test_many_rows_are_inserted_in_order(store, api):
    workflow_id, _ = make(api, {})
    rows = [(workflow_id, f"f{number}", "p") for number in range(2500)]
    with store.transaction():
        store.insert_many("INSERT INTO file (workflow_id, name, path)", 3, rows)
    names = [item["name"] for item in api.items("/files", workflow_id=workflow_id)]
    assert names == [row[1] for row in rows]


def test_two_servers_never_serve_one_database(tmp_path):
    first = torc.Store(str(tmp_path / "x.db"), server=True)
    (tmp_path / "link.db").symlink_to("x.db")
    for name in ("x.db", "link.db"):
        with pytest.raises(torc.Conflict, match="is served already"):
            torc.Store(str(tmp_path / name), server=True)
    torc.Store(str(tmp_path / "x.db")).close()       # a command beside it may look
    with pytest.raises(torc.Conflict):
        torc.Store(str(tmp_path / "x.db"), server=True)
    first.close()
    torc.Store(str(tmp_path / "x.db"), server=True).close()


def test_news_wakes_who_waits_for_that_workflow(store, api):
    first, _ = make(api, {"a": []})
    second, _ = make(api, {"a": []})
    since = {which: api.get(f"/workflows/{which}/changes")["generation"] for which in (first, second)}
    woken = []
    waiter = threading.Thread(target=lambda: (store.wait_news(first, since[first], 30),
                                              woken.append(True)))
    waiter.start()
    until(lambda: store._waiting.get(first))
    api.put(f"/workflows/{second}/cancel")
    assert api.get(f"/workflows/{first}/changes")["generation"] == since[first] and not woken
    api.put(f"/workflows/{first}/cancel")
    waiter.join(10)
    assert woken


def test_news_of_another_process_is_noticed(tmp_path):
    one = torc.LocalClient(str(tmp_path / "x.db"))
    other = torc.LocalClient(str(tmp_path / "x.db"))
    workflow_id, _ = make(one, {"a": []})
    since = one.get(f"/workflows/{workflow_id}/changes")["generation"]
    timer = threading.Timer(0.1, lambda: other.put(f"/workflows/{workflow_id}/cancel"))
    timer.start()
    answer = one.get(f"/workflows/{workflow_id}/changes", since=since, wait_s=30)
    assert answer["is_canceled"] and answer["generation"] != since
    timer.join()
    one.close(), other.close()


LOCK_AND_WAIT = """
import sys, torc
store = torc.Store(sys.argv[1], server=sys.argv[2] == "server", network=True)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("first, second, refused", [
    ("local", "local", False), ("local", "server", True), ("server", "local", True)])
def test_on_a_network_file_system_a_server_excludes_others(tmp_path, first, second, refused):
    path = str(tmp_path / "x.db")
    holder = subprocess.Popen([PYTHON, "-c", LOCK_AND_WAIT, path, first], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "open\n"
    try:
        store = torc.Store(path, server=second == "server", network=True)
        store.close()
        assert not refused
        assert store._network
    except torc.Unreachable as error:
        assert refused and f"pid {holder.pid}" in str(error) and socket.gethostname() in str(error)
    finally:
        holder.communicate("")


def test_on_a_network_file_system_another_host_is_refused_with_its_name(tmp_path, monkeypatch):
    path = str(tmp_path / "x.db")
    store = torc.Store(path, network=True)
    assert store.one("PRAGMA journal_mode") == ("delete",)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(torc.Unreachable, match="in use on host (?!elsewhere)"):
        torc.Store(path, network=True)
    store.close()


def test_a_new_database_that_another_process_is_opening_is_waited_for(tmp_path):
    first = sqlite3.connect(tmp_path / "x.db", isolation_level=None, check_same_thread=False)
    first.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.2, first.execute, ["ROLLBACK"])
    timer.start()
    torc.Store(str(tmp_path / "x.db")).close()
    timer.join()
    first.close()


def test_a_full_disk_changes_nothing_and_says_so(tmp_path):
    store = torc.Store(str(tmp_path / "x.db"))
    api = torc.LocalClient(store.path, "tester", store)
    workflow_id, _ = make(api, {"a": []})
    store._writer.execute(f"PRAGMA max_page_count = {store.one('PRAGMA page_count')[0]}")
    with pytest.raises(torc.Unreachable, match="the disk is full, so nothing was changed"):
        api.post("/bulk_jobs", {"jobs": [{"workflow_id": workflow_id, "name": f"{number}" * 300,
                                          "command": "c" * 1000} for number in range(500)]})
    store._writer.execute("PRAGMA max_page_count = 1000000")
    assert api.get(f"/workflows/{workflow_id}/counts")["total"] == 1
    api.put(f"/workflows/{workflow_id}/cancel")
    store.close()


# ==================================================================================================
# 6 Engine
# ==================================================================================================

DIAMOND = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


def test_a_dependent_does_not_wait_for_a_tick(api):
    workflow_id, ids = make(api, DIAMOND)
    node = make_node(api, workflow_id)
    assert statuses(api, workflow_id) == dict(a="ready", b="blocked", c="blocked", d="blocked")
    complete(api, ids["a"], workflow_id, node)
    assert statuses(api, workflow_id) == dict(a="completed", b="ready", c="ready", d="blocked")


def test_a_grandchild_of_a_failure_does_not_run(api):
    workflow_id, ids = make(api, {"a": [], "b": ["a"], "c": ["b"], "d": ["c"], "other": []})
    complete(api, ids["a"], workflow_id, make_node(api, workflow_id), code=3)
    assert statuses(api, workflow_id) == dict(a="failed", b="canceled", c="canceled", d="canceled",
                                              other="ready")


@pytest.mark.parametrize("status, code, flag, expected", [
    ("failed", 1, True, "canceled"), ("failed", 1, False, "ready"), ("failed", 0, True, "ready"),
    ("completed", 1, True, "ready"), ("terminated", 152, True, "canceled"),
    ("canceled", 1, True, "canceled"), ("pending_failed", 1, True, "blocked")])
def test_what_the_end_of_a_job_does_to_its_dependent(api, status, code, flag, expected):
    workflow_id, ids = make(api, {"a": [], "b": ["a"]}, b={"cancel_on_blocking_job_failure": flag})
    complete(api, ids["a"], workflow_id, make_node(api, workflow_id), code, status)
    assert statuses(api, workflow_id)["b"] == expected


def test_a_failure_is_remembered_until_the_last_sibling_ends(tmp_path):
    store = torc.Store(str(tmp_path / "x.db"))
    api = torc.LocalClient(store.path, "tester", store)
    workflow_id, ids = make(api, {"a1": [], "a2": [], "b": ["a1", "a2"]})
    node = make_node(api, workflow_id)
    complete(api, ids["a1"], workflow_id, node, code=1)
    assert statuses(api, workflow_id)["b"] == "blocked"
    store.close()                         # a restart between the two forgets nothing
    api = torc.LocalClient(store.path, "tester")
    complete(api, ids["a2"], workflow_id, node)
    assert statuses(api, workflow_id)["b"] == "canceled"
    check_store(api.store)
    api.close()


def test_a_job_that_only_the_cascade_canceled_can_still_be_completed(api):
    workflow_id, ids = make(api, {"a": [], "b": ["a"], "c": ["b"]})
    node = make_node(api, workflow_id)
    complete(api, ids["a"], workflow_id, node, code=1)
    complete(api, ids["b"], workflow_id, node, code=0)
    assert statuses(api, workflow_id) == dict(a="failed", b="completed", c="ready")
    with pytest.raises(torc.Invalid, match="already complete"):
        complete(api, ids["b"], workflow_id, node, code=0)


def test_a_job_cannot_be_handed_out_twice(tmp_path):
    clients = [torc.LocalClient(str(tmp_path / "x.db")) for _ in range(4)]
    workflow_id, ids = make(clients[0], {f"j{number}": [] for number in range(200)})
    taken = []

    def claim(client):
        while True:
            jobs = client.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=3)["jobs"]
            if not jobs:
                return
            taken.extend(job["id"] for job in jobs)

    threads = [threading.Thread(target=claim, args=(client,)) for client in clients]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert sorted(taken) == sorted(ids.values())
    [client.close() for client in clients]


SIZES = [{"name": "two", "num_cpus": 2, "memory": "1g"}, {"name": "one", "num_cpus": 1, "memory": "1g"},
         {"name": "gpu", "num_cpus": 1, "num_gpus": 1, "memory": "1g"},
         {"name": "wide", "num_cpus": 1, "num_nodes": 2, "memory": "1g"},
         {"name": "long", "num_cpus": 1, "memory": "1g", "runtime": "PT2H"}]


def claim_resources(client, workflow_id, limit=10, strict=False, **want):
    """Names claimed by upstream's claim_jobs_based_on_resources."""
    answer = client.post(
        f"/workflows/{workflow_id}/claim_jobs_based_on_resources/{limit}",
        {"num_cpus": 3, "memory_gb": 64.0, "num_gpus": 0, "num_nodes": 1, **want},
        strict_scheduler_match=strict)
    return [job["name"] for job in answer["jobs"]]


@pytest.mark.parametrize("kinds, want, limit, claimed", [
    ([0, 1, 0], {}, 10, ["j0", "j1"]),
    ([0, 0, 1], {}, 10, ["j0", "j2"]),
    ([0, 0, 1], {}, 2, ["j0"]),                               # the limit cuts before packing
    ([0], {"num_nodes": 0}, 10, []),
    ([2], {}, 10, []), ([2], {"num_gpus": 1}, 10, ["j0"]),
    ([1], {"memory_gb": 0.5}, 10, []),
    ([3], {}, 10, []), ([3, 1], {"num_nodes": 2}, 10, ["j0"]),
    ([3, 1], {"num_nodes": 3}, 10, ["j0", "j1"]),
    ([1, 1, 1, 1, 1], {"num_nodes": 2, "num_cpus": 2}, 10, ["j0", "j1", "j2", "j3"]),
    ([4], {"time_limit": "PT1H"}, 10, []), ([4], {"time_limit": "PT2H"}, 10, ["j0"]),
    ([1, 1], {}, 0, []), ([1, 1, 1], {}, -1, ["j0", "j1", "j2"]),
])
def test_jobs_are_packed_by_resources(api, kinds, want, limit, claimed):
    graph = {f"j{number}": [] for number in range(len(kinds))}
    workflow_id, _ = make(api, graph, requirements=SIZES, **{
        f"j{number}": {"resource_requirements_id": kind + 1} for number, kind in enumerate(kinds)})
    assert claim_resources(api, workflow_id, limit, **want) == claimed


LIMITED = {"workflow": {"name": "w", "user": "tester", "limits": {"io": 2, "lic": 3}}, "jobs": [
    {"name": f"{kind}{number}", "command": "true", "limits": limits, "priority": priority}
    for kind, limits, priority in (("io", {"io": 1}, 2), ("big", {"io": 2, "lic": 2}, 1), ("lic", {"lic": 1}, 3),
                                   ("free", None, 0)) for number in range(3)]}


def limited(client):
    """A workflow whose jobs ask for limits, ready to run."""
    workflow_id = client.post("/workflow_specs", LIMITED)["id"]
    client.put(f"/workflows/{workflow_id}/status", {"run_id": 1, "is_canceled": False})
    client.post(f"/workflows/{workflow_id}/initialize_jobs")
    return workflow_id


@pytest.mark.parametrize("claim", ["next", "resources", "runner"])
def test_no_claim_takes_more_than_there_is_of_a_limit(client, claim):
    workflow_id = limited(client)
    runner = Conversation(client, workflow_id)

    def names(limit):
        if claim == "resources":
            return claim_resources(client, workflow_id, limit, num_cpus=99)
        jobs = (runner.step(limit=limit)["jobs"] if claim == "runner" else
                client.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=limit)["jobs"])
        return [job["name"] for job in jobs]

    assert names(2) == ["lic0", "lic1"]
    assert names(5) == ["lic2", "io0", "io1", "free0", "free1"]
    assert names(9) == ["free2"]
    assert names(9) == []
    client.put(f"/workflows/{workflow_id}", {"limits": {"io": 4, "lic": 5}})
    assert names(1) == ["io2"]
    assert names(9) == []                                    # big needs two of io


def test_a_limit_is_in_use_until_the_process_is_gone(client):
    workflow_id = limited(client)
    runner, other = Conversation(client, workflow_id), Conversation(client, workflow_id)
    jobs = runner.step(limit=8)["jobs"]
    io = [job for job in jobs if job["name"].startswith("io")]
    client.post(f"/jobs/{io[0]['id']}/stop", status="canceled")
    assert other.step(limit=9)["jobs"] == []                 # it may still run
    generation = client.get(f"/workflows/{workflow_id}/changes")["generation"]
    runner.step([runner.done(io[0], 3)])
    assert client.get(f"/workflows/{workflow_id}/changes")["generation"] != generation      # who waits is told
    assert [job["name"] for job in other.step(limit=9)["jobs"]] == ["io2"]


def test_why_and_status_name_the_limit_that_is_short(client):
    workflow_id = limited(client)
    runner = Conversation(client, workflow_id)
    runner.step(limit=8)
    ids = {job["name"]: job["id"] for job in client.items("/jobs", workflow_id=workflow_id)}
    assert client.get(f"/jobs/{ids['io2']}/why")["sentence"] == (
        'it is ready, but it needs 1 of the limit "io" (0 of 2 free)')
    assert {(row["count"], row["why"]) for row in client.get(f"/workflows/{workflow_id}/summary")["waiting"]} == {
        (1, 'it needs 1 of the limit "io" (0 of 2 free)'),
        (3, 'each needs 2 of the limit "io" (0 of 2 free) and 2 of the limit "lic" (0 of 3 free)')}
    assert {row["short"] for row in client.get(f"/workflows/{workflow_id}/unfinished")["ready"]} == {
        '1 of the limit "io" (0 of 2 free)',
        '2 of the limit "io" (0 of 2 free) and 2 of the limit "lic" (0 of 3 free)'}


def test_a_job_cannot_ask_for_more_than_there_is_of_a_limit(client):
    workflow_id = limited(client)
    path, job = f"/workflows/{workflow_id}", {"workflow_id": workflow_id, "name": "x", "command": "true"}
    for limits, told in (({"lik": 1}, 'job "x": limits: it asks for {"lik":1}, the workflow has {"io":2,"lic":3}'),
                         ({"io": 3}, 'it asks for {"io":3}, the workflow has')):
        with pytest.raises(torc.Invalid, match=re.escape(told)):
            client.post("/jobs", {**job, "limits": limits})
        with pytest.raises(torc.Invalid):
            client.put(f"/jobs/{client.items('/jobs', workflow_id=workflow_id).__next__()['id']}", {"limits": limits})
    for limits in ({"io": 2}, {"io": 1, "lic": 3}, {}):
        with pytest.raises(torc.Invalid, match="it asks for"):
            client.put(path, {"limits": limits})
    for limits in ({"io": 0}, {"io": 1.5}, {"io": True}, {"i o": 1}, {"i=o": 1}, {"\x1b": 1}, {"": 1}, 3):
        with pytest.raises(torc.Invalid, match="is not an"):
            client.put(path, {"limits": limits})
    assert client.get(path)["limits"] == {"io": 2, "lic": 3}
    assert len(list(client.items("/jobs", workflow_id=workflow_id))) == 12


def test_claims_take_higher_priority_first_then_lower_id(api):
    workflow_id, _ = make(api, {name: [] for name in "abcd"}, b={"priority": 5}, d={"priority": 5})
    jobs = api.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=3)["jobs"]
    assert [job["name"] for job in jobs] == ["b", "d", "a"]
    assert claim_resources(api, workflow_id) == ["c"]


def test_jobs_of_other_schedulers_are_claimed_only_when_there_are_no_others(api):
    workflow_id, ids = make(api, {"a": [], "b": []}, start=False)
    api.put(f"/jobs/{ids['a']}", {"scheduler_id": 7})
    api.post(f"/workflows/{workflow_id}/initialize_jobs")
    assert claim_resources(api, workflow_id, 1, scheduler_config_id=9) == ["b"]
    assert claim_resources(api, workflow_id, 1, strict=True, scheduler_config_id=9) == []
    assert claim_resources(api, workflow_id, 1, scheduler_config_id=9) == ["a"]


def test_initialize_follows_the_two_modes(api):
    workflow_id, ids = make(api, DIAMOND)
    end_jobs(api, workflow_id, ids, a=0, b=1, c=0)
    api.post(f"/workflows/{workflow_id}/initialize_jobs")
    assert statuses(api, workflow_id) == dict(a="completed", b="failed", c="completed", d="canceled")
    api.post(f"/workflows/{workflow_id}/reset_job_status", failed_only=True)
    assert statuses(api, workflow_id)["d"] == "uninitialized"
    api.post(f"/workflows/{workflow_id}/initialize_jobs", only_uninitialized=True)
    assert statuses(api, workflow_id) == dict(a="completed", b="ready", c="completed", d="blocked")
    results = api.get("/results", workflow_id=workflow_id)["items"]
    assert sorted(item["job_id"] for item in results) == [ids["a"], ids["c"]]
    assert api.get("/results", workflow_id=workflow_id, all_runs=True)["total_count"] == 3


def test_files_and_user_data_imply_dependencies(api):
    payload = {"workflow": {"name": "w", "user": "u"},
               "files": [{"name": "f", "path": "f"}], "user_data": [{"name": "u"}],
               "jobs": [{"name": "reads", "command": "true", "input_file_ids": [1]},
                        {"name": "writes1", "command": "true", "output_file_ids": [1]},
                        {"name": "writes2", "command": "true", "output_file_ids": [1],
                         "output_user_data_ids": [1]},
                        {"name": "knows", "command": "true", "input_user_data_ids": [1]}]}
    workflow_id = api.post("/workflow_specs", payload)["id"]
    api.post(f"/workflows/{workflow_id}/initialize_jobs")
    rows = api.get(f"/workflows/{workflow_id}/job_dependencies")["items"]
    assert [(row["job_name"], row["depends_on_job_name"]) for row in rows] == [
        ("reads", "writes1"), ("reads", "writes2"), ("knows", "writes2")]


def test_changed_inputs_are_found_until_the_next_initialization(api):
    workflow_id, ids = make(api, {"a": [], "b": []})
    end_jobs(api, workflow_id, ids, a=0, b=0)
    api.put(f"/jobs/{ids['a']}", {"priority": 3})           # no input
    def changed(**query):
        return api.post(f"/workflows/{workflow_id}/process_changed_job_inputs",
                        **query)["reinitialized_jobs"]

    assert changed(dry_run=True) == []
    api.post(f"/workflows/{workflow_id}/reset_job_status")
    api.put(f"/jobs/{ids['a']}", {"command": "false"})
    assert changed() == changed() == ["a"]
    api.post(f"/workflows/{workflow_id}/initialize_jobs")
    assert changed() == []


def test_cancel_touches_pending_and_running_jobs_only(api):
    workflow_id, ids = make(api, {"run": [], "wait": [], "child": ["run"]})
    api.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=1)
    assert api.put(f"/workflows/{workflow_id}/cancel")["is_canceled"]
    assert api.put(f"/workflows/{workflow_id}/cancel")["is_canceled"]
    assert statuses(api, workflow_id) == dict(run="canceled", wait="ready", child="blocked")
    assert api.post(f"/workflows/{workflow_id}/claim_next_jobs")["jobs"] == []
    assert api.get(f"/workflows/{workflow_id}/is_complete")["is_complete"]
    api.post(f"/workflows/{workflow_id}/reset_status")
    assert statuses(api, workflow_id) == dict(run="canceled", wait="ready", child="canceled")


def test_reset_status_refuses_a_workflow_at_work(api):
    workflow_id, _ = make(api, {"a": []})
    api.post(f"/workflows/{workflow_id}/claim_next_jobs")
    with pytest.raises(torc.Invalid, match="1 job pending or running, 0 allocations scheduled"):
        api.post(f"/workflows/{workflow_id}/reset_status")
    api.post(f"/workflows/{workflow_id}/reset_status", force=True)


# ---- runner_step


def test_a_step_frees_claims_and_reports_in_one_go(client):
    workflow_id, _ = make(client, DIAMOND)
    runner = Conversation(client, workflow_id)
    [job] = runner.step(limit=4)["jobs"]
    assert job["name"] == "a" and job["run_id"] == 1
    answer = runner.step([runner.done(job)], limit=4)
    assert [job["name"] for job in answer["jobs"]] == ["b", "c"] and not answer["has_ready"]
    answer = runner.step([runner.done(job) for job in answer["jobs"]], limit=4)
    answer = runner.step([runner.done(job) for job in answer["jobs"]], limit=4, counts=True)
    assert answer["is_complete"] and answer["counts"]["completed"] == 4


def test_a_repeated_step_counts_nothing_twice_and_loses_nothing(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"], "c": ["a"], "x": []})
    runner = Conversation(client, workflow_id)
    first, second = runner.step(limit=2)["jobs"]
    done = [runner.done(first)]
    lost = runner.step(done, limit=1)     # this answer is lost: b was assigned, nobody knows
    [runner.held.pop(job["id"]) for job in lost["jobs"]]
    again = runner.step(done, limit=1, repeat=True)
    assert [job["name"] for job in again["jobs"]] == [job["name"] for job in lost["jobs"]] == ["b"]
    assert client.get("/results", workflow_id=workflow_id, all_runs=True)["total_count"] == 1
    assert statuses(client, workflow_id) == dict(a="completed", b="pending", c="ready", x="pending")


def test_a_repeated_step_does_not_lose_the_job_it_claimed_anew(client):
    """A step hands in a failure that is tried again and claims; its answer gets lost."""
    workflow_id, ids = make(client, {"a": []})
    runner = Conversation(client, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    done = runner.done(job, 1, requeue=True)
    assert [job["attempt_id"] for job in runner.step([done], limit=1)["jobs"]] == [2]
    runner.held = {}
    [again] = runner.step([done], limit=1, repeat=True)["jobs"]
    assert again["attempt_id"] == 2
    runner.step([runner.done(again)])
    assert statuses(client, workflow_id) == {"a": "completed"}


def test_a_repeated_completion_does_not_count_for_the_next_run(client):
    workflow_id, ids = make(client, {"a": []})
    runner = Conversation(client, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    runner.step([runner.done(job, 1)])
    client.post(f"/workflows/{workflow_id}/reset_job_status")
    client.put(f"/workflows/{workflow_id}/status", {"run_id": 2, "is_canceled": False})
    client.post(f"/workflows/{workflow_id}/initialize_jobs")
    [again] = runner.step(limit=1)["jobs"]
    assert (again["run_id"], again["attempt_id"]) == (2, 1)
    runner.step([runner.done(job, 1)])
    assert statuses(client, workflow_id) == {"a": "pending"}


def test_a_step_older_than_the_last_changes_nothing(client):
    workflow_id, _ = make(client, {"a": []})
    runner = Conversation(client, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    runner.held.clear()
    answer = runner.step(returns=[{"job_id": job["id"], "attempt_id": 1}], limit=1)
    assert [job["name"] for job in answer["jobs"]] == ["a"]
    runner.number -= 1                    # a late copy of an earlier request
    runner.step(returns=[{"job_id": job["id"], "attempt_id": 1}], repeat=True)
    assert statuses(client, workflow_id) == {"a": "pending"}


def test_mixed_sizes_fill_a_node_without_oversubscribing(client):
    workflow_id, _ = make(client, {f"j{n}": [] for n in range(5)}, requirements=SIZES,
                          j0={"resource_requirements_id": 1}, j1={"resource_requirements_id": 1},
                          j2={"resource_requirements_id": 3}, j3={"resource_requirements_id": 2},
                          j4={"resource_requirements_id": 2})
    runner = Conversation(client, workflow_id)
    answer = runner.step(claim={"limit": 2, "bins": [[3, 2**36, 0]], "whole": [4, 2**36, 0]})
    assert [job["name"] for job in answer["jobs"]] == ["j0", "j3"]


@pytest.mark.parametrize("kinds, bins, claimed", [
    # of SIZES: 0 needs two CPUs, 1 one, 3 two nodes. A node has three CPUs.
    ([0, 0, 0], [3, 3], ["j0", "j1"]),               # one CPU is left on each: no room for two
    ([0, 0, 1, 1, 1], [3, 3], ["j0", "j1", "j2", "j3"]),
    ([3, 1], [3, 3], ["j0"]),
    ([3, 1], [2, 3], ["j1"]),                        # no two idle nodes
    ([1, 3], [3, 3, 3], ["j0", "j1"]),
])
def test_jobs_are_packed_node_by_node(client, kinds, bins, claimed):
    workflow_id, _ = make(client, {f"j{n}": [] for n in range(len(kinds))}, requirements=SIZES,
                          **{f"j{n}": {"resource_requirements_id": kind + 1}
                             for n, kind in enumerate(kinds)})
    runner = Conversation(client, workflow_id)
    answer = runner.step(claim={"limit": 9, "bins": [[cpus, 2**36, 0] for cpus in bins],
                                "whole": [3, 2**36, 0]})
    assert [job["name"] for job in answer["jobs"]] == claimed
    room = torc.Room(len(bins), (3, 2**36, 0))
    room.bins = [(cpus, 2**36, 0) for cpus in bins]  # and the runner finds room for all of them
    needs = {int(key): torc.read_need(need) for key, need in answer["requirements"].items()}
    before = list(room.bins)
    placed = [(needs[job["resource_requirements_id"]], room.place(needs[
        job["resource_requirements_id"]])) for job in answer["jobs"]]
    assert all(places for _, places in placed)
    for need, places in placed:
        room.leave(need, places)
    assert room.bins == before and room.number == 0


def test_prefetched_jobs_are_of_the_same_requirement_and_can_go_back(client):
    workflow_id, ids = make(client, {f"j{n}": [] for n in range(4)}, requirements=SIZES,
                            j1={"resource_requirements_id": 2}, j3={"resource_requirements_id": 2})
    need = client.get(f"/jobs/{ids['j1']}")["resource_requirements_id"]
    runner = Conversation(client, workflow_id)
    answer = runner.step(claim={"limit": 0, "bins": [[0, 0, 0]], "whole": [4, 2**36, 0],
                                "prefetch": {"resource_requirements_id": need, "limit": 8}})
    assert [(job["name"], job["prefetched"]) for job in answer["jobs"]] == [("j1", True), ("j3", True)]
    runner.held.clear()
    runner.step(returns=[{"job_id": job["id"], "attempt_id": 1} for job in answer["jobs"]])
    assert set(statuses(client, workflow_id).values()) == {"ready"}


def test_a_retried_attempt_does_not_lose_its_result(client):
    workflow_id, ids = make(client, {"a": []})
    runner = Conversation(client, workflow_id)
    for attempt, code in ((1, 7), (2, 8), (3, 0)):
        [job] = runner.step(limit=1)["jobs"]
        assert job["attempt_id"] == attempt
        runner.step([runner.done(job, code, requeue=code != 0, stderr_tail=f"try {attempt}")])
    results = client.get("/results", workflow_id=workflow_id, all_runs=True, include_stderr=True)
    assert [(item["attempt_id"], item["return_code"], item["stderr_tail"])
            for item in results["items"]] == [(1, 7, "try 1"), (2, 8, "try 2"), (3, 0, "try 3")]
    assert client.get("/results", workflow_id=workflow_id)["items"][0]["attempt_id"] == 3


def test_a_canceled_job_is_not_handed_out_again_before_its_process_has_ended(client):
    workflow_id, ids = make(client, {"a": []})
    runner, other = Conversation(client, workflow_id), Conversation(client, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    runner.step(starts=[{"job_id": job["id"], "attempt_id": 1}])
    client.post(f"/jobs/{ids['a']}/stop", status="canceled")
    client.post(f"/jobs/{ids['a']}/rerun")
    assert other.step(limit=1)["jobs"] == []
    assert "still being stopped" in client.get(f"/jobs/{ids['a']}/why")["sentence"]
    answer = runner.step()
    assert answer["stop"] == [{"job_id": job["id"], "attempt_id": 1, "status": "ready"}]
    runner.step([runner.done(job, 143)])
    assert [job["attempt_id"] for job in other.step(limit=1)["jobs"]] == [2]
    assert client.get("/results", workflow_id=workflow_id, all_runs=True)["total_count"] == 1


def test_stopping_a_job_cancels_its_dependents_and_tells_its_runner(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"]})
    runner = Conversation(client, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    assert client.post(f"/jobs/{ids['a']}/stop", status="terminated")["status"] == "terminated"
    assert statuses(client, workflow_id) == dict(a="terminated", b="canceled")
    assert runner.step()["stop"][0]["status"] == "terminated"
    with pytest.raises(torc.Invalid, match="has already ended"):
        client.post(f"/jobs/{ids['a']}/stop", status="canceled")


def test_a_rerun_job_unblocks_what_its_failure_had_canceled(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"], "c": ["b"]})
    complete(client, ids["a"], workflow_id, make_node(client, workflow_id), code=1)
    job = client.post(f"/jobs/{ids['a']}/rerun")
    assert job["attempt_id"] == 2
    assert statuses(client, workflow_id) == dict(a="ready", b="blocked", c="blocked")


def test_what_had_not_begun_waits_again_for_a_job_that_is_rerun(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"]}, b={"cancel_on_blocking_job_failure": False})
    complete(client, ids["a"], workflow_id, make_node(client, workflow_id), code=1)
    assert statuses(client, workflow_id) == dict(a="failed", b="ready")
    client.post(f"/jobs/{ids['a']}/rerun")
    assert statuses(client, workflow_id) == dict(a="ready", b="blocked")


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("cancel", [False, True])
def test_jobs_that_run_again_together_keep_their_order(client, order, cancel):
    workflow_id, ids = make(client, {"a": [], "b": ["a"]}, b={"cancel_on_blocking_job_failure": cancel})
    end_jobs(client, workflow_id, ids, **dict.fromkeys("a" if cancel else "ab", 1))
    client.post(f"/workflows/{workflow_id}/rerun_jobs", {"jobs": [{"job_id": ids[name]} for name in order]})
    assert statuses(client, workflow_id) == dict(a="ready", b="blocked")


def test_a_dead_runners_jobs_are_ready_with_the_next_attempt(client):
    workflow_id, ids = make(client, {"a": [], "b": [], "c": ["a"]})
    runner = Conversation(client, workflow_id)
    first, second = runner.step(limit=2)["jobs"]
    runner.step(starts=[{"job_id": first["id"], "attempt_id": 1}])
    answer = client.post(f"/compute_nodes/{runner.node}/release")
    assert answer == {"requeued": [ids["a"], ids["b"]], "canceled": 0}
    assert statuses(client, workflow_id) == dict(a="ready", b="ready", c="blocked")
    [result] = client.get("/results", workflow_id=workflow_id, all_runs=True)["items"]
    assert (result["job_id"], result["return_code"]) == (ids["a"], -128)
    assert client.get(f"/compute_nodes/{runner.node}")["is_active"] is False


@pytest.mark.parametrize("ended", [{}, {"status": "terminated", "return_code": 152}])
def test_a_rule_on_node_failure_limits_the_attempts_that_dead_runners_cost(client, ended):
    workflow_id, ids = make(client, {"a": []}, handlers=[{"name": "h", "rules": json.dumps(
        [{"exit_codes": [1], "max_attempts": 9}, {"on": ["oom", "node_failure"], "max_attempts": 2}])}],
        a={"failure_handler_id": 1})
    for attempt, then in ((1, "ready"), (2, ended.get("status", "failed"))):
        runner = Conversation(client, workflow_id)
        [job] = runner.step(limit=1)["jobs"]
        runner.step(starts=[{"job_id": job["id"], "attempt_id": attempt}])
        client.post(f"/compute_nodes/{runner.node}/release", **ended)
        assert statuses(client, workflow_id) == {"a": then}
    assert client.get(f"/jobs/{ids['a']}")["attempt_id"] == 2


def test_a_delay_outlasts_the_server_and_ends_without_a_runner(api, store):
    workflow_id, ids = make(api, {"a": [], "b": ["a"]})
    runner = Conversation(api, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    runner.step(starts=[{"job_id": job["id"], "attempt_id": 1}])
    answer = runner.step([runner.done(job, 1, requeue=True, raised={"memory": "3g"}, delay_s=60.5,
                                       completion_time=torc.iso_time(time.time()))], limit=1)
    assert answer["jobs"] == [] and 55 < answer["delay_s"] <= 60.5
    assert statuses(api, workflow_id) == {"a": "blocked", "b": "blocked"}
    assert torc.progress(store, [workflow_id])[workflow_id]["state"] == "waiting"
    assert torc.unfinished(store, workflow_id)["waiting"] == []
    assert torc.stall_reasons(api, workflow_id)[0] is None
    with store.transaction():
        torc.end_delays(store, time.time() + 61)
    assert statuses(api, workflow_id) == {"a": "ready", "b": "blocked"}
    [again] = runner.step(limit=1)["jobs"]
    assert again["attempt_id"] == 2
    need = api.get(f"/resource_requirements/{again['resource_requirements_id']}")
    assert (need["name"], need["runtime"]) == ("default_recovered_PT1H_3g", "PT1H")


def test_a_job_that_is_reset_waits_no_longer(api, store):
    workflow_id, ids = make(api, {"a": []})
    runner = Conversation(api, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    runner.step([runner.done(job, 1, requeue=True, delay_s=600.0, completion_time=torc.iso_time(time.time()))])
    assert statuses(api, workflow_id) == {"a": "blocked"}
    api.post(f"/workflows/{workflow_id}/reset_job_status")
    api.post(f"/workflows/{workflow_id}/initialize_jobs")
    assert statuses(api, workflow_id) == {"a": "ready"}


def test_a_thousand_jobs_that_are_raised_alike_share_their_requirements(api, store):
    workflow_id, ids = make(api, {f"j{number}": [] for number in range(1000)})
    with store.transaction():
        for job_id in ids.values():
            torc.raise_job(store, job_id, {"memory": "2g"})
    needs = list(api.items("/resource_requirements", workflow_id=workflow_id))
    assert [need["name"] for need in needs] == ["default", "default_recovered_PT1H_2g"]


def test_a_killed_runner_does_not_leave_jobs_running_for_ever(store, api):
    workflow_id, ids = make(api, {"a": [], "b": ["a"], "x": []})
    runner = Conversation(api, workflow_id)
    first, second = runner.step(limit=2)["jobs"]
    runner.step(starts=[{"job_id": first["id"], "attempt_id": 1}])
    heard = store.heard[runner.node]
    assert torc.expired_nodes(store, heard + 20 * 60, 0)[0] == {}
    assert torc.expired_nodes(store, heard + 20 * 60 + 61, 0)[0] == {runner.node: 20 * 60 + 60}
    with store.transaction():             # it has spoken since somebody looked
        torc.expire_node(store, runner.node, time.time(), -math.inf)
    assert statuses(api, workflow_id)["a"] == "running"
    store.heard[runner.node] = -math.inf
    assert torc.expired_nodes(store, heard + 1, heard)[0] == {}          # the server itself was frozen
    with store.transaction():
        torc.expire_node(store, runner.node, time.time(), -math.inf)
    assert statuses(api, workflow_id) == dict(a="failed", b="canceled", x="ready")
    # Its journal turns up later: the real end replaces the -128 and frees what that canceled.
    runner.number = 0
    runner.step([runner.done(first)], replay=True)
    assert statuses(api, workflow_id) == dict(a="completed", b="ready", x="ready")
    assert api.get("/results", workflow_id=workflow_id)["items"][0]["return_code"] == 0


def test_a_replayed_completion_does_not_touch_a_job_that_was_started_again(api):
    workflow_id, ids = make(api, {"a": []})
    dead, alive = Conversation(api, workflow_id), Conversation(api, workflow_id)
    [job] = dead.step(limit=1)["jobs"]
    dead.step(starts=[{"job_id": job["id"], "attempt_id": 1}])
    api.post(f"/compute_nodes/{dead.node}/release")
    [again] = alive.step(limit=1)["jobs"]
    dead.step([dead.done(job)], replay=True)
    assert statuses(api, workflow_id) == {"a": "pending"}
    alive.step([alive.done(again)])
    results = api.get("/results", workflow_id=workflow_id, all_runs=True)["items"]
    assert [(item["attempt_id"], item["return_code"]) for item in results] == [(1, 0), (2, 0)]


def test_upstreams_runners_never_beat_and_are_never_failed_for_it(store, api):
    workflow_id, ids = make(api, {"a": []})
    node = make_node(api, workflow_id)
    api.post(f"/workflows/{workflow_id}/claim_next_jobs")
    api.put(f"/jobs/{ids['a']}/start_job/1/{node}")
    assert torc.expired_nodes(store, time.monotonic() + 10**6, 0)[0] == {}


# ---- what may run, and what may not

def act(client, workflow_id, trigger, job_ids=None, **fields):
    """An action that runs a command; returns its id."""
    return client.post(f"/workflows/{workflow_id}/actions", {
        "workflow_id": workflow_id, "trigger_type": trigger, "action_type": "run_commands",
        "action_config": {"commands": ["true"]}, "job_ids": job_ids, **fields})["id"]


def pending(client, workflow_id):
    """Ids of the actions that are due."""
    return [action["id"] for action in client.get(f"/workflows/{workflow_id}/actions/pending")]


def test_a_job_that_is_retried_counts_once_for_an_action(client):
    workflow_id, ids = make(client, {"a": [], "x": [], "b": ["x"]})
    ready = act(client, workflow_id, "on_jobs_ready", [ids["a"], ids["b"]])
    ended = act(client, workflow_id, "on_jobs_complete", [ids["a"], ids["b"]])
    runner = Conversation(client, workflow_id)
    for code in (1, 1, 0):
        job = next(job for job in runner.step(limit=2)["jobs"] + list(runner.held.values())
                   if job["name"] == "a")
        runner.step([runner.done(job, code, requeue=code != 0)])
        assert pending(client, workflow_id) == []
    client.post(f"/jobs/{ids['a']}/rerun")
    [job] = runner.step(limit=1)["jobs"]
    runner.step([runner.done(job)])
    assert pending(client, workflow_id) == []
    runner.step([runner.done(next(iter(runner.held.values())))])     # x, so b is ready
    assert pending(client, workflow_id) == [ready]
    runner.step([runner.done(job) for job in runner.step(limit=1)["jobs"]])
    assert pending(client, workflow_id) == [ready, ended]


def test_a_reset_takes_pending_actions_back(client):
    workflow_id, ids = make(client, {"a": []})
    action = act(client, workflow_id, "on_jobs_ready", [ids["a"]])
    start = act(client, workflow_id, "on_workflow_start")
    client.post(f"/workflows/{workflow_id}/initialize_jobs")
    assert pending(client, workflow_id) == [action, start]
    client.post(f"/workflows/{workflow_id}/reset_job_status")
    assert pending(client, workflow_id) == []


def test_an_action_does_not_wait_for_a_job_that_was_deleted(client):
    workflow_id, ids = make(client, {"a": [], "b": []})
    action = act(client, workflow_id, "on_jobs_complete", [ids["a"], ids["b"]])
    complete(client, ids["a"], workflow_id, make_node(client, workflow_id))
    assert pending(client, workflow_id) == []
    client.delete(f"/jobs/{ids['b']}")
    assert pending(client, workflow_id) == [action]
    [shown] = client.get(f"/workflows/{workflow_id}/actions")
    assert (shown["job_ids"], shown["trigger_count"], shown["required_triggers"]) == ([ids["a"]], 1, 1)


def test_deleting_the_last_unfinished_job_completes_the_workflow(client):
    workflow_id, ids = make(client, {"a": [], "b": []})
    last = act(client, workflow_id, "on_workflow_complete")
    complete(client, ids["a"], workflow_id, make_node(client, workflow_id))
    before = client.get(f"/workflows/{workflow_id}/changes")
    assert not before["is_complete"] and pending(client, workflow_id) == []
    client.delete(f"/jobs/{ids['b']}")
    after = client.get(f"/workflows/{workflow_id}/changes")
    assert after["is_complete"] and after["pending_actions"] and pending(client, workflow_id) == [last]
    assert after["generation"] != before["generation"]       # who waits is woken


def test_jobs_that_were_all_canceled_are_not_ready_for_an_action(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"], "c": ["a"], "d": []})
    act(client, workflow_id, "on_jobs_ready", [ids["b"], ids["c"]])
    some = act(client, workflow_id, "on_jobs_ready", [ids["b"], ids["d"]])
    complete(client, ids["a"], workflow_id, make_node(client, workflow_id), code=1)
    assert pending(client, workflow_id) == [some]            # d is ready, and b never will be


@pytest.mark.parametrize("status", ["canceled", "terminated"])
def test_what_depends_on_a_stopped_job_is_canceled_whatever_its_exit_code(client, status):
    workflow_id, ids = make(client, {"a": [], "b": [], "c": ["a", "b"], "d": ["a"]})
    runner = Conversation(client, workflow_id)
    jobs = {job["name"]: job for job in runner.step(limit=2)["jobs"]}
    runner.step(starts=[{"job_id": job["id"], "attempt_id": 1} for job in jobs.values()])
    client.post(f"/jobs/{ids['a']}/stop", status=status)
    runner.step([runner.done(jobs["a"], 0)])         # it trapped the signal and ended with 0
    runner.step([runner.done(jobs["b"], 0)])
    assert statuses(client, workflow_id) == {"a": status, "b": "completed", "c": "canceled", "d": "canceled"}


def test_nothing_behind_a_canceled_job_is_started_by_a_reinitialization(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"], "c": ["a"]}, start=False)
    client.post(f"/jobs/{ids['a']}/stop", status="canceled")
    client.post(f"/workflows/{workflow_id}/initialize_jobs", only_uninitialized=True)
    assert statuses(client, workflow_id) == {"a": "canceled", "b": "canceled", "c": "canceled"}


def test_changed_data_does_not_start_what_lies_behind_a_failure(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"]})
    data = client.post("/user_data", {"workflow_id": workflow_id, "name": "u", "data": 1},
                       consumer_job_id=ids["b"])
    client.post(f"/workflows/{workflow_id}/initialize_jobs")
    complete(client, ids["a"], workflow_id, make_node(client, workflow_id), code=1)
    client.put(f"/user_data/{data['id']}", {"data": 2})
    assert client.post(f"/workflows/{workflow_id}/process_changed_job_inputs")["reinitialized_jobs"] == ["b"]
    client.post(f"/workflows/{workflow_id}/initialize_jobs", only_uninitialized=True)
    assert statuses(client, workflow_id) == {"a": "failed", "b": "canceled"}


def test_a_terminated_job_and_its_dependent_are_not_handed_out_together(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"]})
    client.post(f"/jobs/{ids['a']}/stop", status="terminated")
    client.post(f"/workflows/{workflow_id}/initialize_jobs", only_uninitialized=True)
    assert statuses(client, workflow_id) == {"a": "ready", "b": "blocked"}


def test_a_job_is_not_run_again_beside_what_it_depends_on(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"], "c": []})
    node = make_node(client, workflow_id)
    complete(client, ids["a"], workflow_id, node, code=1)
    with pytest.raises(torc.Invalid, match=rf'job "b" cannot run again: it depends on "a" \(job {ids["a"]}\), '
                                           "which is failed"):
        client.post(f"/jobs/{ids['b']}/rerun")
    with pytest.raises(torc.Invalid, match='it depends on "a"'):
        client.put(f"/jobs/{ids['b']}/manage_status_change/ready/1")
    client.post(f"/workflows/{workflow_id}/rerun_jobs", {"jobs": [{"job_id": ids["b"]}, {"job_id": ids["a"]}]})
    assert statuses(client, workflow_id) == {"a": "ready", "b": "blocked", "c": "ready"}


def test_a_retry_while_a_runner_has_the_job_waits_for_its_end(client):
    workflow_id, ids = make(client, {"a": []})
    runner, other = Conversation(client, workflow_id), Conversation(client, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    runner.step(starts=[{"job_id": job["id"], "attempt_id": 1}])
    assert client.post(f"/jobs/{ids['a']}/retry/1", max_retries=5)["attempt_id"] == 2
    assert other.step(limit=1)["jobs"] == []
    assert runner.step()["stop"][0]["job_id"] == ids["a"]
    runner.step([runner.done(job, 143)])
    assert [job["attempt_id"] for job in other.step(limit=1)["jobs"]] == [2]


def test_a_step_that_was_rolled_back_or_a_restart_hands_out_nothing_twice(tmp_path):
    api = torc.LocalClient(str(tmp_path / "x.db"), "tester")
    workflow_id, _ = make(api, {f"j{number}": [] for number in range(8)})
    runner = Conversation(api, workflow_id)
    with pytest.raises(torc.NotFound), api.store.transaction():
        torc.runner_step(api.store, workflow_id, {"compute_node_id": runner.node, "step": 1}, time.time())
        raise torc.NotFound("rolled back")
    assert len(runner.step(limit=2)["jobs"]) == 2            # step 1 was never taken
    api.close()
    runner.client = api = torc.LocalClient(str(tmp_path / "x.db"), "tester")     # another server
    assert runner.step(limit=2, repeat=True)["jobs"] == []
    runner.held.clear()
    assert len(runner.step(limit=2, repeat=True)["jobs"]) == 2
    assert sorted(statuses(api, workflow_id).values()) == ["pending"] * 2 + ["ready"] * 6
    check_store(api.store)
    api.close()


@pytest.mark.parametrize("status", ["blocked", "ready", "pending", "disabled", "gone"])
def test_an_attempt_ends_in_no_other_status_than_a_final_one(client, status):
    workflow_id, _ = make(client, {"a": []})
    runner = Conversation(client, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    with pytest.raises(torc.Invalid, match=f"status: '{status}' is not a status in which an attempt can end"):
        runner.step([{**runner.done(job), "status": status}])
    assert statuses(client, workflow_id) == {"a": "pending"}


def test_a_step_tells_nothing_of_other_workflows(client):
    mine, _ = make(client, {"a": []})
    theirs, their = make(client, {"b": []})
    runner = Conversation(client, mine)
    answers = [runner.step(held=[[job_id, 1]])["stop"] for job_id in (their["b"], 10**6)]
    assert [answer[0]["status"] for answer in answers] == ["deleted", "deleted"]


# ---- what is out of date

def changed(client, workflow_id):
    """{name: why it is out of date}."""
    answer = client.post(f"/workflows/{workflow_id}/process_changed_job_inputs", dry_run=True)
    return dict(zip(answer["reinitialized_jobs"], answer["reasons"].values()))


def run_all(client, workflow_id, runner, code=0):
    """Run what is ready until nothing is."""
    while True:
        jobs = runner.step(limit=300)["jobs"]
        if not jobs:
            return
        runner.step([runner.done(job, code) for job in jobs])


def test_a_job_is_compared_with_what_it_saw_when_it_ran(client):
    workflow_id, ids = make(client, {"writes": [], "reads": []}, start=False)
    data = client.post("/user_data", {"workflow_id": workflow_id, "name": "u"}, producer_job_id=ids["writes"],
                       consumer_job_id=ids["reads"])
    client.post(f"/workflows/{workflow_id}/initialize_jobs")
    runner = Conversation(client, workflow_id)
    [job] = runner.step(limit=9)["jobs"]
    client.put(f"/user_data/{data['id']}", {"data": {"found": 1}})       # the job writes it
    runner.step([runner.done(job)])
    run_all(client, workflow_id, runner)
    assert changed(client, workflow_id) == {}                # nothing has changed since
    client.put(f"/user_data/{data['id']}", {"data": {"found": 1}})       # the same once more
    assert changed(client, workflow_id) == {}
    client.put(f"/user_data/{data['id']}", {"data": {"found": 2}})
    assert changed(client, workflow_id) == {"reads": "its user data changed"}
    client.post(f"/jobs/{ids['reads']}/rerun")
    run_all(client, workflow_id, runner)
    assert changed(client, workflow_id) == {}
    client.put(f"/jobs/{ids['reads']}", {"invocation_script": "nice"})
    assert changed(client, workflow_id) == {"reads": "its command changed"}
    sentence = client.get(f"/jobs/{ids['reads']}/why")["sentence"]
    assert sentence.endswith(f"Since then its command changed; to run it again: torc workflows reinit {workflow_id}")


def test_what_depends_on_a_job_that_ran_again_is_out_of_date(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"], "c": ["b"], "x": []})
    runner = Conversation(client, workflow_id)
    run_all(client, workflow_id, runner)
    client.post(f"/jobs/{ids['a']}/rerun", only=True)
    assert statuses(client, workflow_id) == {"a": "ready", "b": "completed", "c": "completed", "x": "completed"}
    run_all(client, workflow_id, runner)
    assert changed(client, workflow_id) == {"b": '"a", on which it depends, ran again'}
    client.post(f"/jobs/{ids['a']}/rerun")
    assert statuses(client, workflow_id) == {"a": "ready", "b": "blocked", "c": "blocked", "x": "completed"}
    run_all(client, workflow_id, runner)
    assert changed(client, workflow_id) == {}


def test_a_file_newer_than_its_reader_is_seen(client):
    workflow_id, ids = make(client, {"a": []}, start=False)
    file = client.post("/files", {"workflow_id": workflow_id, "name": "f", "path": "f", "st_mtime": 1.5})
    job = client.post("/jobs", {"workflow_id": workflow_id, "name": "reads", "command": "c",
                                "input_file_ids": [file["id"]]})
    client.post(f"/workflows/{workflow_id}/initialize_jobs")
    run_all(client, workflow_id, Conversation(client, workflow_id))
    client.put(f"/files/{file['id']}", {"st_mtime": 2.5})
    assert changed(client, workflow_id) == {"reads": "its input files changed"} and job


def test_an_archived_workflow_refuses_what_would_run_it(client):
    workflow_id, ids = make(client, {"a": [], "b": []})
    complete(client, ids["a"], workflow_id, make_node(client, workflow_id))
    client.put(f"/workflows/{workflow_id}/status", {"run_id": 1, "is_canceled": False, "is_archived": True})
    for path, query in ((f"/jobs/{ids['a']}/rerun", {}), (f"/jobs/{ids['b']}/stop", {"status": "canceled"}),
                        (f"/jobs/{ids['a']}/retry/1", {"max_retries": 3}),
                        (f"/workflows/{workflow_id}/reset_job_status", {}),
                        (f"/workflows/{workflow_id}/reset_status", {"force": True})):
        with pytest.raises(torc.Invalid, match=f"workflow {workflow_id} is archived; to bring it back: torc workflows archive false"):
            client.post(path, **query)


# ---- any operation in any state

class Game:
    """A random workflow and random operations of clients and runners on it, over the API."""

    def __init__(self, client, seed):
        self.client, self.random = client, random.Random(seed)
        names = [f"j{number}" for number in range(self.random.randint(2, 7))]
        graph = {name: [other for other in names[:place] if self.random.random() < 0.4]
                 for place, name in enumerate(names)}
        self.workflow_id, ids = make(client, graph, start=False, **{
            name: {"cancel_on_blocking_job_failure": False} for name in names if self.random.random() < 0.3})
        self.jobs, self.run_id, self.log = list(ids.values()), 0, []
        self.runners = [Conversation(client, self.workflow_id, num_cpus=8) for _ in range(2)]
        self.foreign = make_node(client, self.workflow_id)
        for trigger in ("on_jobs_ready", "on_jobs_complete"):
            act(client, self.workflow_id, trigger,
                self.random.sample(self.jobs, min(2, len(self.jobs))), persistent=False)

    def turn(self):
        """One operation; refusals are fine, faults and violated invariants are not."""
        chosen = self.random.choice(MOVES)
        self.log.append(chosen.__name__)
        with contextlib.suppress(torc.Invalid, torc.NotFound, torc.Conflict, torc.BadRequest, IndexError):
            chosen(self)
        check_store(self.client.store)
        holders = [job_id for runner in self.runners for job_id in runner.held]
        assert len(holders) == len(set(holders)), "two runners have the same job"

    def job(self):
        """A path of some job."""
        return f"/jobs/{self.random.choice(self.jobs)}"

    def at(self, path, **query):
        """A POST below the workflow."""
        return self.client.post(f"/workflows/{self.workflow_id}{path}", **query)

    def initialize(self):
        self.run_id += 1
        self.client.put(f"/workflows/{self.workflow_id}/status", {"run_id": self.run_id, "is_canceled": False})
        self.at("/initialize_jobs", only_uninitialized=self.random.random() < 0.5)

    def step(self):
        runner = self.random.choice(self.runners)
        done = [runner.done(job, self.random.choice([0, 0, 1, 143]), requeue=self.random.random() < 0.15)
                for job in list(runner.held.values()) if self.random.random() < 0.5]
        gone = [job for job in runner.held.values() if self.random.random() < 0.1
                and job["id"] not in {one["job_id"] for one in done}]
        started = [{"job_id": job["id"], "attempt_id": job["attempt_id"]} for job in runner.held.values()
                   if self.random.random() < 0.7]
        back = [{"job_id": job["id"], "attempt_id": job["attempt_id"]} for job in gone]
        [runner.held.pop(job["id"]) for job in gone]
        answer = runner.step(done, limit=self.random.randint(0, 3), starts=started, returns=back)
        for one in answer["stop"]:        # what is stopped has ended by the next step
            runner.held.pop(one["job_id"], None)

    def claim(self):
        for job in self.at("/claim_next_jobs", limit=1)["jobs"]:
            self.client.put(f"/jobs/{job['id']}/start_job/{self.run_id}/{self.foreign}")

    def end(self):
        job = self.client.get(self.job())
        complete(self.client, job["id"], self.workflow_id, self.foreign, self.random.choice([0, 1, 143]),
                 run_id=self.run_id, attempt=job["attempt_id"])

    def stop(self):
        self.client.post(self.job() + "/stop", status=self.random.choice(["canceled", "terminated"]))

    def retry(self):
        self.client.post(f"{self.job()}/retry/{self.run_id}", max_retries=9)

    def rerun(self):
        self.client.post(self.job() + "/rerun", only=self.random.random() < 0.5)

    def manage(self):
        status = self.random.choice(["uninitialized", "blocked", "ready", "pending", "disabled",
                                     "pending_failed"])
        self.client.put(f"{self.job()}/manage_status_change/{status}/{self.run_id}")

    def reset(self):
        self.at("/reset_job_status", failed_only=self.random.random() < 0.7)

    def cancel(self):
        self.client.put(f"/workflows/{self.workflow_id}/cancel")

    def revive(self):
        self.at("/reset_status", force=True)

    def change(self):
        self.client.put(self.job(), {"cancel_on_blocking_job_failure": self.random.random() < 0.5})

    def compare(self):
        self.at("/process_changed_job_inputs")

    def delete(self):
        if self.random.random() < 0.2:
            self.client.delete(self.job())

    def forget(self):
        results = self.client.get("/results", workflow_id=self.workflow_id, all_runs=True)["items"]
        self.client.delete(f"/results/{self.random.choice(results)['id']}")

    def release(self):
        place = self.random.randrange(2)
        self.client.post(f"/compute_nodes/{self.runners[place].node}/release")
        self.runners[place] = Conversation(self.client, self.workflow_id, num_cpus=8)


MOVES = [Game.step] * 6 + [Game.initialize] * 2 + [
    Game.claim, Game.end, Game.stop, Game.retry, Game.rerun, Game.manage, Game.reset, Game.cancel, Game.revive,
    Game.change, Game.compare, Game.delete, Game.forget, Game.release]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_no_operation_in_any_state_violates_an_invariant(api, part):
    """60 games of thirty operations each."""
    for seed in range(60 * part, 60 * part + 60):
        game = Game(api, seed)
        game.initialize()
        for _ in range(30):
            try:
                game.turn()
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {game.log}: {error}") from None
        api.delete(f"/workflows/{game.workflow_id}")


# ---- what the views of a workflow show

def has_shape(value, shape, where="answer"):
    """Assert that a JSON value has the types of `shape`: a type, a tuple of types (None: null), a
    list with the shape of its items, or a dict of the keys that the pages read."""
    if isinstance(shape, dict):
        for key, inner in shape.items():
            assert key in value, f"{where} has no {key}"
            has_shape(value[key], inner, f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for item in value:
            has_shape(item, shape[0], f"{where}[]")
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        assert value is None and None in kinds or isinstance(
            value, tuple(kind for kind in kinds if kind)), f"{where} is {value!r}"


NUMBER, MAYBE = (int, float), (int, float, None)
ROW = {"id": int, "name": str, "command": str, "status": str, "attempt_id": int, "num_cpus": int,
       "memory_bytes": MAYBE, "runtime_s": MAYBE, "requirement": str, "host": str, "start_ms": MAYBE,
       "ran_s": MAYBE, "peak_memory_bytes": MAYBE, "note": str, "family": str}
FLOW = {"id": int, "name": str, "user": str, "counts": dict, "total": int, "done": int,
        "state": str, "created_ms": int, "run_id": int, "output_dir": (str, None)}
NODE = {"name": str, "status": str, "sub": str, "why": str, "href": str}
SERIES = [{"name": str, "kind": str, "points": [NUMBER]}]
READ_BY_THE_PAGES = [
    ("/workflows/W/summary", {}, {
        "counts": dict, "total": int, "done": int, "state": str, "rate": NUMBER, "left_s": MAYBE,
        "started_ms": MAYBE, "ended_ms": MAYBE, "elapsed_s": MAYBE, "runners": int,
        "runners_text": str, "history": [NUMBER], "longest": [ROW], "families": (list, None),
        "waiting": [{"count": int, "status": str, "why": str}],
        "failures": [{"count": int, "cause": str, "line": str}]}),
    ("/workflows/W/graph", {}, {"total": int, "nodes": [NODE], "edges": [list]}),
    ("/workflows/W/graph", {"around": "J"}, {"nodes": [NODE], "edges": [list], "more": str}),
    ("/workflows/W/failures", {}, {"total": int, "downstream": int, "groups": [{
        "id": str, "count": int, "status": str, "cause": str, "line": str,
        "advice": str, "verdict": str, "family": str, "first_ms": MAYBE, "last_ms": MAYBE,
        "hosts": str, "tail": str, "jobs": [{"id": int, "name": str}]}]}),
    ("/workflows/W/timeline", {"bins": 10}, {"from": int, "to": int, "runners": [{
        "name": str, "cpus": int, "busy": int, "idle_s": NUMBER, "ran": int, "start": int,
        "end": int, "gaps": [{"from": int, "to": int, "text": str}],
        "jobs": [{"id": int, "name": str, "status": str, "start": int, "end": int,
                  "lane": int}]}]}),
    ("/workflows/W/usage", {"bins": 10}, {
        "times": [int], "cpu": SERIES, "memory": SERIES, "requirements": [{
            "name": str, "jobs": int, "cpus": int, "cpu_used": NUMBER, "peak": NUMBER,
            "memory": int, "longest_s": NUMBER, "runtime_s": int, "verdict": str,
            "advice": str}]}),
    ("/workflows", {"include_counts": True}, {"items": [FLOW], "total_count": int}),
    ("/workflows/W", {"include_counts": True}, FLOW),
    ("/jobs", {"workflow_id": "W", "include_results": True}, {"items": [ROW], "total_count": int}),
    ("/jobs/J", {"include_results": True}, {**ROW, "priority": int, "cpu_used": (str, None),
                                            "handler": (str, None), "inputs": (str, None),
                                            "outputs": (str, None)}),
]


class Past:
    """A workflow with a past: jobs that ended at known seconds after `began`."""

    def __init__(self, api, graph, cpus=4, **options):
        self.api, self.began = api, int(time.time()) - 1000
        self.workflow_id, self.ids = make(api, graph, **options)
        self.node = make_node(api, self.workflow_id, num_cpus=cpus, hostname="c1",
                              start_time=torc.iso_time(self.began))

    def end(self, name, start, ran, code=0, **more):
        """Job `name` ran from `start` for `ran` seconds."""
        status = "completed" if code == 0 else "failed"
        self.api.post(f"/jobs/{self.ids[name]}/complete_job/{status}/1", {
            "job_id": self.ids[name], "workflow_id": self.workflow_id, "run_id": 1,
            "attempt_id": 1, "compute_node_id": self.node, "return_code": code, "status": status,
            "exec_time_minutes": ran / 60, **more,
            "completion_time": torc.iso_time(self.began + start + ran)})

    def run(self, name):
        """Job `name` is running."""
        with self.api.store.transaction():
            self.api.store.execute("UPDATE job SET status = ?, started_ms = ?, compute_node_id = ?"
                                   " WHERE id = ?", (torc.RUNNING, int(1000 * time.time()) - 60_000,
                                                     self.node, self.ids[name]))

    def get(self, path, **query):
        """An answer below the workflow."""
        return self.api.get(f"/workflows/{self.workflow_id}{path}", **query)


ASSEMBLY = {"fetch": [], "index": ["fetch"], "align_1": ["index"], "align_2": ["index"],
            "align_3": ["index"], "merge": ["align_1", "align_2", "align_3"], "report": ["merge"]}


@pytest.fixture
def past(api):
    """An assembly at work: align_1 done, align_2 failed, align_3 running."""
    past = Past(api, ASSEMBLY)
    past.end("fetch", 0, 100)
    past.end("index", 100, 200, peak_memory_bytes=5 * 2**20)
    past.end("align_1", 400, 100, avg_cpu_percent=50.0)
    past.end("align_2", 400, 200, code=137, stderr_tail="reading 17\nKilled")
    past.run("align_3")
    return past


@pytest.mark.parametrize("path, query, shape", READ_BY_THE_PAGES)
def test_answers_have_what_the_pages_read(past, path, query, shape):
    values = {"W": str(past.workflow_id), "J": str(past.ids["align_2"])}
    path = re.sub(r"\b[WJ]\b", lambda match: values[match[0]], path)
    query = {name: values.get(value, value) for name, value in query.items()}
    has_shape(past.api.get(path, **query), shape, path)


def test_a_summary_counts_and_says_what_waits_for_what(past):
    summary = past.get("/summary")
    assert summary["counts"] == {"blocked": 2, "running": 1, "completed": 3, "failed": 1}
    assert (summary["total"], summary["done"], summary["state"]) == (7, 4, "running")
    assert [(row["count"], row["why"]) for row in summary["waiting"]] == [
        (1, "merge waits for align_3; align_2 failed, so it will be canceled then"),
        (1, "report waits for merge, and will be canceled with it")]
    assert [row["name"] for row in summary["longest"]] == ["align_3"]
    assert summary["failures"] == [{"count": 1, "cause": "exit 137, out of memory",
                                    "line": "Killed"}]
    assert summary["runners_text"] == "1 on c1, 4 CPUs" and sum(summary["history"]) == 4
    assert summary["started_ms"] == past.began * 1000


@pytest.mark.parametrize("number, canceled, active, state", [
    ({}, 0, False, "not initialized"), ({torc.UNINITIALIZED: 3}, 0, True, "not initialized"),
    ({torc.READY: 1, torc.BLOCKED: 3}, 0, False, "waiting"), ({torc.READY: 1}, 0, True, "running"),
    ({torc.COMPLETED: 2, torc.DISABLED: 1}, 0, True, "done"), ({torc.RUNNING: 1}, 1, 1, "canceled"),
    ({torc.COMPLETED: 2, torc.FAILED: 1, torc.CANCELED: 1}, 0, False, "failed"),
    ({torc.COMPLETED: 2, torc.PENDING_FAILED: 1}, 0, True, "stuck"),
    ({torc.BLOCKED: 2, torc.DISABLED: 1}, 0, False, "stuck")])
def test_a_workflow_has_a_state_in_a_word(number, canceled, active, state):
    assert torc.workflow_state(number, canceled, active, 0) == state
    assert torc.workflow_state({}, 0, False, 1) == "done"


def test_what_no_runner_can_hold_is_stuck_and_says_so(api):
    past = Past(api, {"a": [], "b": []}, requirements=[
        {"name": "gpu", "num_cpus": 1, "num_gpus": 4, "num_nodes": 1, "memory": "1g",
         "runtime": "PT1H"}], a={"resource_requirements_id": 1}, b={"resource_requirements_id": 1})
    summary = past.get("/summary")
    assert summary["state"] == "stuck" and summary["waiting"] == [{
        "count": 2, "status": "ready",
        "why": "each needs 4 GPUs, the largest runner has 0: none of them can start"}]


def test_a_large_graph_is_of_families(api):
    graph = {"prepare": []}
    graph.update({f"sim_{number:03d}": ["prepare"] for number in range(250)})
    graph.update({f"score_{number:03d}": [f"sim_{number:03d}"] for number in range(250)})
    graph["report"] = list(graph)[251:]
    past = Past(api, graph)
    past.end("prepare", 0, 10)
    past.end("sim_000", 10, 20)
    answer = past.get("/graph")
    assert (answer["families"], answer["total"]) == (True, 502)
    assert [(node["name"], node["counts"]) for node in answer["nodes"]] == [
        ("prepare", {"completed": 1}), ("sim_*", {"ready": 249, "completed": 1}),
        ("score_*", {"blocked": 249, "ready": 1}), ("report", {"blocked": 1})]
    assert answer["edges"] == [["f0", "f1"], ["f1", "f2"], ["f2", "f3"]]
    assert answer["nodes"][1]["sub"] == "each 20s on average"
    summary = past.get("/summary")
    assert [row["why"] for row in summary["waiting"]] == [
        "a free slot on the runner is needed (0 of 4 CPUs are busy)",
        "score_*: each waits for its own sim_*", "report: waits for every score_*"]
    assert summary["families"] == answer["nodes"]
    page = api.get("/jobs", workflow_id=past.workflow_id, family="score", limit=3)
    assert page["total_count"] == 250 and page["items"][0]["name"] == "score_000"


def test_a_graph_shows_files_and_user_data_if_asked(api):
    spec = {
        "name": "g", "files": [{"name": "raw", "path": "raw.csv"}, {"name": "mid", "path": "mid.csv"},
                               {"name": "idle", "path": "idle"}],
        "user_data": [{"name": "found"}],
        "jobs": [{"name": "a", "command": "true", "input_files": ["raw"], "output_files": ["mid"]},
                 {"name": "b", "command": "true", "input_files": ["mid"], "output_user_data": ["found"]},
                 {"name": "c", "command": "true", "depends_on": ["a"], "input_user_data": ["found"]}]}
    payload = torc.read_spec("g.json", json.dumps(spec)).payload
    payload["workflow"]["user"] = "tester"
    workflow_id = api.post("/workflow_specs", payload)["id"]
    path = f"/workflows/{workflow_id}/graph"
    assert [node["name"] for node in api.get(path)["nodes"]] == ["a", "b", "c"]
    answer = api.get(path, data=True)
    names = {node["id"]: node["name"] for node in answer["nodes"]}
    assert sorted((names[one], names[other]) for one, other in answer["edges"]) == [
        ("a", "c"), ("a", "mid"), ("b", "found"), ("found", "c"), ("mid", "b"), ("raw", "a")]
    assert {node["name"]: (node["kind"], node["why"]) for node in answer["nodes"] if "kind" in node} == {
        "raw": ("file", "raw.csv, no job creates it, read by a"),
        "mid": ("file", "mid.csv, made by a, read by b"),
        "found": ("user_data", "made by b, read by c")}
    assert answer["nodes"][4]["href"] == f"#/w/{workflow_id}/jobs/{answer['nodes'][0]['id']}"


def test_families_follow_jobs_that_come_and_go(api):
    workflow_id, _ = make(api, {f"a_{number}": [] for number in range(401)})
    assert api.get(f"/workflows/{workflow_id}/graph")["nodes"][0]["counts"] == {"ready": 401}
    job = api.post("/jobs", {"workflow_id": workflow_id, "name": "z_1", "command": "true",
                             "depends_on_job_ids": [1]})
    answer = api.get(f"/workflows/{workflow_id}/graph")
    assert [node["name"] for node in answer["nodes"]] == ["a_*", "z_1"]
    assert answer["edges"] == [["f0", "f1"]]
    api.delete(f"/jobs/{job['id']}")
    assert len(api.get(f"/workflows/{workflow_id}/graph")["nodes"]) == 1


@pytest.mark.parametrize("names, families", [
    (["a_1", "a_02", "b"], ["a", "a", "b"]), (["x_1_2", "lr-0.5"], ["x", "lr"]), (["7"], ["#"]),
    ([f"{chr(97 + n % 26)}{chr(97 + n // 26)}_x" for n in range(100)], ["#"] * 100),
    ([f"job_{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(100)], ["job"] * 100)])
def test_a_family_is_the_name_without_its_numbers_and_there_are_not_too_many(names, families):
    assert torc.family_names(names) == families


def test_edges_that_close_a_circle_are_left_out_of_a_graph():
    assert torc.acyclic(range(4), [(0, 1), (1, 2), (2, 0), (2, 2), (2, 3), (3, 4)]) == [
        [0, 1], [1, 2], [2, 3]]


def test_the_graph_around_a_job_has_five_on_each_side(api):
    workflow_id, ids = make(api, {"a": [], **{f"b{number}": ["a"] for number in range(9)}})
    answer = api.get(f"/workflows/{workflow_id}/graph", around=ids["a"])
    assert len(answer["nodes"]) == 6 and answer["more"] == "frees 4 more"
    assert all(edge[0] == ids["a"] for edge in answer["edges"])
    with pytest.raises(torc.NotFound):
        api.get(f"/workflows/{workflow_id}/graph", around=10_000)


def test_a_step_without_figures_leaves_the_results_own(past):
    job_id = past.ids["fetch"]
    [result] = past.api.get("/results", workflow_id=past.workflow_id, job_id=job_id)["items"]
    past.api.put(f"/results/{result['id']}", {"avg_cpu_percent": 150.0})
    past.api.post("/slurm_stats", {"workflow_id": past.workflow_id, "job_id": job_id, "attempt_id": 1,
                                   "run_id": result["run_id"]})
    assert past.api.get(f"/results/{result['id']}")["avg_cpu_percent"] == 150.0


def test_what_slurm_says_of_a_step_goes_into_its_result(past):
    job_id = past.ids["fetch"]
    before = past.get("/usage", bins=4)["requirements"][0]["cpu_used"]
    result = past.api.get("/results", workflow_id=past.workflow_id, job_id=job_id)["items"][0]
    assert "peak_memory_bytes" not in result
    past.api.post("/slurm_stats", {
        "workflow_id": past.workflow_id, "job_id": job_id, "run_id": result["run_id"],
        "attempt_id": result["attempt_id"], "max_rss_bytes": 5 * 2**20, "ave_cpu_seconds": 30.0})
    result = past.api.get(f"/results/{result['id']}")
    assert result["peak_memory_bytes"] == 5 * 2**20
    assert result["avg_cpu_percent"] == round(30 / (result["exec_time_minutes"] * 60) * 100, 1)
    assert past.get("/usage", bins=4)["requirements"][0]["cpu_used"] != before


def test_a_time_that_is_none_is_refused_and_an_old_one_breaks_no_view(api):
    workflow_id, ids = make(api, {"a": [], "b": []})
    body = {"workflow_id": workflow_id, "job_id": ids["a"], "run_id": 1, "return_code": 0,
            "compute_node_id": make_node(api, workflow_id), "exec_time_minutes": 0.1, "status": "completed"}
    for text in ("Mon Jan 1 2024", "2024-01-01", ""):
        with pytest.raises(torc.Invalid, match="completion_time: .* is not a time such as"):
            api.post("/results", {**body, "completion_time": text})
    made = api.post("/results", {**body, "completion_time": "2024-01-01T00:00:00.123456789+01:00"})
    api.store.execute("UPDATE result SET completion_time = 'noon' WHERE id = ?", (made["id"],))
    for view in ("summary", "timeline", "usage"):
        assert api.get(f"/workflows/{workflow_id}/{view}")


def test_views_know_results_and_requirements_that_were_changed(past):
    def shown():
        return past.get("/usage", bins=4)["requirements"], [
            bar for lane in past.get("/timeline")["runners"] for bar in lane["jobs"]
            if bar["status"] != "running"]

    shown()
    [result] = past.api.get("/results", workflow_id=past.workflow_id, job_id=past.ids["fetch"])["items"]
    past.api.put(f"/results/{result['id']}", {"exec_time_minutes": 0.5})
    need = past.api.post("/resource_requirements", {"workflow_id": past.workflow_id, "name": "wide",
                                                    "num_cpus": 3, "memory": "2g", "runtime": "PT1H"})
    past.api.put(f"/jobs/{past.ids['index']}", {"resource_requirements_id": need["id"]})
    kept = shown()
    torc.FAMILIES_CACHE.cache_clear()
    assert kept == shown()


def test_jobs_that_come_and_go_break_no_view_that_is_asked_meanwhile(api, monkeypatch):
    monkeypatch.setattr(torc, "FEW_JOBS", 5)
    workflow_id, ids = make(api, {**{f"a_{number}": [] for number in range(9)}, "a_9": ["a_0"]})
    api.delete(f"/jobs/{ids['a_3']}")     # ids with a gap
    real = torc.Store.bulk

    def late(store, sql, width, params):
        if "d.job_id" in sql:             # after the families were read, before their edges are
            monkeypatch.setattr(torc.Store, "bulk", real)
            api.post("/jobs", {"workflow_id": workflow_id, "name": "z_1", "command": "true",
                               "depends_on_job_ids": [ids["a_1"]]})
        return real(store, sql, width, params)
    monkeypatch.setattr(torc.Store, "bulk", late)
    assert [node["name"] for node in api.get(f"/workflows/{workflow_id}/graph")["nodes"]] == ["a_*"]
    assert torc.Store.bulk is real
    assert api.get(f"/workflows/{workflow_id}/graph")["edges"] == [["f0", "f1"]]


def test_there_is_no_forecast_without_a_runner(past):
    assert past.get("/summary")["left_s"] > 0
    for node in past.api.items("/compute_nodes", workflow_id=past.workflow_id):
        past.api.put(f"/compute_nodes/{node['id']}", {"is_active": False})
    assert past.get("/summary")["left_s"] is None


def test_jobs_run_again_together_or_none_of_them(api):
    workflow_id, ids = make(api, {name: [] for name in "abc"})
    other, theirs = make(api, {"z": []})
    end_jobs(api, workflow_id, ids, a=1, b=1)
    need = api.post("/resource_requirements", {"workflow_id": workflow_id, "name": "more",
                                               "num_cpus": 2, "memory": "2g", "runtime": "PT1H"})
    path, again = f"/workflows/{workflow_id}/rerun_jobs", [
        {"job_id": ids["a"]}, {"job_id": ids["b"], "resource_requirements_id": need["id"]}]
    for bad, message in (({"job_id": ids["c"]}, "only a job that has ended"),
                         ({"job_id": theirs["z"]}, f"{theirs['z']}"),
                         ({"job_id": ids["a"], "resource_requirements_id": 999}, "999"),
                         ({}, "missing field `job_id`")):
        with pytest.raises(torc.TorcError, match=message):
            api.post(path, {"jobs": [*again, bad]})
        assert statuses(api, workflow_id)["a"] == "failed"
    assert [job["id"] for job in api.post(path, {"jobs": again}, dry_run=True)["jobs"]] == [ids["a"], ids["b"]]
    assert statuses(api, workflow_id)["a"] == "failed"
    assert api.post(path, {"jobs": again})["count"] == 2
    assert set(statuses(api, workflow_id).values()) == {"ready"}
    assert api.get(f"/jobs/{ids['b']}")["resource_requirements_id"] == need["id"]
    assert api.get(f"/jobs/{ids['b']}")["attempt_id"] == 2


def test_a_job_that_runs_without_a_compute_node_breaks_no_timeline(api):
    workflow_id, ids = make(api, {"a": []})
    api.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=1)
    api.put(f"/jobs/{ids['a']}/start_job/1/99")
    time.sleep(0.01)                      # it has run for some milliseconds
    for jobs in (True, False):
        assert api.get(f"/workflows/{workflow_id}/timeline", jobs=jobs)["runners"] == []


@pytest.mark.parametrize("begin, end", [("-" + "9" * 16, "9" * 16), ("9" * 15, "9" * 16), ("0", "1")])
def test_usage_and_timeline_of_any_stretch_of_time_are_answered(past, begin, end):
    for path in ("/usage", "/timeline"):
        assert past.get(path, **{"from": begin, "to": end, "bins": torc.MAX_BINS})


def test_a_summary_of_a_workflow_that_has_just_gone_is_not_found(store):
    with pytest.raises(torc.NotFound):
        torc.summary(store, 999, 0)


def test_a_timeline_knows_what_a_runner_waited_for(past):
    [lane] = past.get("/timeline")["runners"]
    began = past.began * 1000
    assert [(bar["name"], bar["lane"], bar["start"] - began, bar["end"] - began)
            for bar in lane["jobs"]][:4] == [
        ("fetch", 0, 0, 100_000), ("index", 0, 100_000, 300_000), ("align_1", 0, 400_000, 500_000),
        ("align_2", 1, 400_000, 600_000)]
    [long, short] = lane["gaps"]          # until align_3 began a minute ago, and before align_1
    assert re.fullmatch(r"idle 5m 4\ds, nothing was ready", long["text"])
    assert short == {"from": began + 300_000, "to": began + 400_000,
                     "text": "idle 1m 40s, nothing was ready"}
    assert lane["ran"] == 5 and 440 <= lane["idle_s"] < 450
    assert abs(lane["busy"] - round(100 * 660 / 4000)) <= 1


def test_a_gap_names_the_job_that_ended_it(api):
    past = Past(api, {"a": [], "b": [], "c": ["b"]}, cpus=1)
    past.end("a", 0, 10)
    other = past.node
    past.node = make_node(api, past.workflow_id, hostname="c2",
                          start_time=torc.iso_time(past.began))
    past.end("b", 0, 500)
    past.node = other
    past.end("c", 500, 400)
    first, second = past.get("/timeline")["runners"]
    assert "idle 8m 10s, waited for b" in [gap["text"] for gap in first["gaps"]]
    assert re.fullmatch(r"idle 8m 2\ds, nothing is ready", second["gaps"][0]["text"])


def test_a_crowded_timeline_shows_how_busy_a_runner_was(past, monkeypatch):
    monkeypatch.setattr(torc, "MAX_BARS", 3)
    began = past.began * 1000
    [lane] = past.get("/timeline", **{"from": began, "to": began + 800_000}, bins=8)["runners"]
    assert lane["bins"] == [[0.25, False], [0.25, False], [0.25, False], [0.0, False],
                            [0.5, False], [0.25, False], [0.0, True], [0.0, False]]
    assert "jobs" not in lane


def test_usage_sums_what_was_asked_and_used(past):
    answer = past.get("/usage", bins=10)
    cpu = {series["kind"]: series["points"] for series in answer["cpu"]}
    assert [round(cpu[kind][4], 1) for kind in ("asked", "used", "limit")] == [2.0, 0.5, 4.0]
    [row] = answer["requirements"]
    assert (row["name"], row["jobs"], row["longest_s"]) == ("default", 7, 200.0)


def test_new_and_replaced_results_are_noticed(past):
    assert past.get("/timeline")["runners"][0]["ran"] == 5
    past.api.delete("/results/1")
    assert past.get("/timeline")["runners"][0]["ran"] == 4
    past.end("align_3", 500, 100)
    assert past.get("/timeline")["runners"][0]["ran"] == 4


def test_failures_are_grouped_by_exit_and_last_line(api):
    past = Past(api, {f"case_{number}": [] for number in range(5)}, requirements=[
        {"name": "small", "num_cpus": 1, "num_gpus": 0, "num_nodes": 1, "memory": "2g",
         "runtime": "PT20M"}], **{f"case_{number}": {"resource_requirements_id": 1}
                                  for number in range(5)})
    for number in range(3):
        past.end(f"case_{number}", number, 10, code=1, stderr_tail=f"x\nbad mesh in case {number}\n")
    past.end("case_3", 5, 10, code=137, peak_memory_bytes=2 * 2**30 + 1)
    past.end("case_4", 5, 1200, code=152)
    answer = past.get("/failures")
    assert answer["total"] == 5
    assert [(group["count"], group["cause"], group["verdict"]) for group in answer["groups"]] == [
        (3, "exit 1", "unknown"), (1, "exit 137, out of memory", "memory"), (1, "exit 152, time limit", "runtime")]
    first = answer["groups"][0]
    assert first["line"] == "bad mesh in case 0" and first["tail"] == "x\nbad mesh in case 0\n"
    for name, advice, option in (("case_3", "Used 2.0 GB, requested 2.0 GB.", "--memory 3073m"), (
            "case_4", "Ran for 20m00s, requested 20m00s.", "--runtime PT28M")):
        number = past.ids[name]
        assert api.get(f"/jobs/{number}/why")["next"] == (
            f"{advice} Run torc jobs update {number} {option}, then torc jobs retry {number}; for all such jobs: torc recover "
            f"{past.workflow_id}")
    [one] = past.get("/failures", group=first["id"])["groups"]
    assert one["job_ids"] == [past.ids[f"case_{number}"] for number in range(3)]


@pytest.mark.parametrize("query, names", [
    ({"status": "failed,running"}, ["align_2", "align_3"]), ({"search": "LIGN"}, [
        "align_1", "align_2", "align_3"]), ({"search": "a%n"}, []), ({"search": "_2"}, ["align_2"]),
    ({"search": " 3 lig"}, ["align_3"]), ({"search": "2 3"}, []),
    ({"family": "align", "status": "completed"}, ["align_1"]), ({"family": "none"}, []),
    ({"sort_by": "ran", "reverse_sort": True, "limit": 2}, ["align_2", "index"]),
    ({"sort_by": "start", "reverse_sort": True, "limit": 3}, ["align_3", "align_2", "align_1"]),
    ({"sort_by": "memory", "reverse_sort": True, "limit": 1}, ["index"]),
    ({"sort_by": "host", "limit": 1, "offset": 6}, ["align_3"])])
def test_jobs_are_found_and_sorted_by_how_they_ended(past, query, names):
    page = past.api.get("/jobs", workflow_id=past.workflow_id, include_results=True, **query)
    assert [job["name"] for job in page["items"]] == names


def test_a_list_of_jobs_says_how_each_ended(past):
    jobs = {job["name"]: job for job in past.api.get(
        "/jobs", workflow_id=past.workflow_id, include_results=True)["items"]}
    assert jobs["align_2"]["note"] == "exit 137, out of memory"
    assert jobs["merge"]["note"] == "waits for align_3"
    assert (jobs["index"]["ran_s"], jobs["index"]["host"]) == (200.0, "c1")
    assert 60 <= jobs["align_3"]["ran_s"] < 80
    past.end("align_3", 800, 100)
    page = past.api.get("/jobs", workflow_id=past.workflow_id, include_results=True, search="merge")
    assert page["items"][0]["note"] == "align_2 failed"


def test_a_bad_status_in_a_list_of_them_is_refused(api):
    workflow_id, _ = make(api, {"a": []})
    with pytest.raises(torc.BadRequest, match="failed,gone"):
        api.get("/jobs", workflow_id=workflow_id, status="failed,gone")


@pytest.mark.parametrize("query, names", [
    ({"search": "ASSEM"}, ["assembly"]), ({"search": "100%"}, ["other"]),
    ({"all_users": False}, ["assembly"]), ({}, ["assembly", "other"])])
def test_workflows_are_searched(api, query, names):
    for name, user, more in (("assembly", "tester", {}), ("other", "eve", {"description": "100%"})):
        api.post("/workflows", {"name": name, "user": user, **more})
    with api.store.transaction():
        api.store.execute("UPDATE workflow SET user = name WHERE name = 'other'")
    assert [one["name"] for one in api.get("/workflows", **query)["items"]] == names


# ---- events for those who listen

def heard(subscription):
    """[(type, data), ...] of what a subscription has."""
    text = subscription.take(0).decode()
    return [(kind, json.loads(data).get("data", json.loads(data))) for kind, data in
            re.findall(r"event: (\w+)\ndata: (.+)\n\n", text)]


def test_both_kinds_of_runners_are_heard_and_failed_transactions_are_not(store, api):
    workflow_id, ids = make(api, {"a": [], "b": [], "c": ["b"]})
    subscription = store.subscribe(workflow_id, "info")
    runner = Conversation(api, workflow_id)
    jobs = runner.step(limit=1)["jobs"]
    runner.step([runner.done(jobs[0])], starts=[{"job_id": jobs[0]["id"], "attempt_id": 1}])
    api.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=1)
    api.put(f"/jobs/{ids['b']}/start_job/1/{runner.node}")
    complete(api, ids["b"], workflow_id, runner.node, code=3)
    with pytest.raises(torc.Internal), store.transaction():
        store.tell(workflow_id, "job_failed", "error", {})
        raise torc.Internal("no")
    runner.step(closing=True)
    events = heard(subscription)
    assert [kind for kind, _ in events] == [
        "compute_node_started", "job_started", "job_completed", "job_started", "job_failed",
        "job_canceled", "compute_node_stopped"]
    assert events[1][1] == {"job_id": ids["a"], "job_name": "a", "compute_node_id": runner.node,
                            "run_id": 1}
    assert events[4][1] == {"job_id": ids["b"], "job_name": "b", "status": "failed",
                            "return_code": 3}
    assert set(events[0][1]) == {"compute_node_id", "hostname", "pid", "num_cpus", "memory_gb",
                                 "num_gpus", "compute_node_type"}
    assert set(events[6][1]) == {"compute_node_id", "hostname", "pid", "duration_seconds",
                                 "compute_node_type"}
    subscription.close()
    assert not store.listening


def test_initializing_and_scheduling_are_heard(store, api):
    workflow_id, _ = make(api, {"a": []})
    subscription = store.subscribe(workflow_id, "info")
    api.post(f"/workflows/{workflow_id}/initialize_jobs")
    api.post(f"/workflows/{workflow_id}/initialize_jobs", only_uninitialized=True)
    api.post("/scheduled_compute_nodes", {
        "workflow_id": workflow_id, "scheduler_id": 7, "scheduler_config_id": 1,
        "scheduler_type": "slurm", "status": "pending"})
    events = heard(subscription)
    assert [kind for kind, _ in events] == ["workflow_reinitialized", "workflow_started",
                                            "scheduler_node_created"]
    assert set(events[0][1]) == {"category", "type", "user", "message"}
    assert events[2][1] == {"category": "scheduler", "scheduled_compute_node_id": 1,
                            "scheduler_id": 7, "scheduler_config_id": 1, "scheduler_type": "slurm",
                            "status": "pending"}


def test_what_a_person_takes_back_is_stored_and_heard_once_for_many_jobs(store, api):
    workflow_id, ids = make(api, {"a": [], **{f"b{number}": ["a"] for number in range(40)}})
    node = make_node(api, workflow_id)
    for name in ids:
        complete(api, ids[name], workflow_id, node)
    subscription = store.subscribe(workflow_id, "info")
    again = {"jobs": [{"job_id": ids["a"]}]}
    api.post(f"/workflows/{workflow_id}/rerun_jobs", again, dry_run=True)
    api.post(f"/workflows/{workflow_id}/rerun_jobs", again)
    complete(api, ids["a"], workflow_id, node, code=1, attempt=2)
    api.post(f"/jobs/{ids['a']}/rerun")
    complete(api, ids["a"], workflow_id, node, code=1, attempt=3)
    api.post(f"/jobs/{ids['a']}/retry/1", max_retries=9)
    api.post(f"/workflows/{workflow_id}/reset_job_status")
    api.post("/events", {"workflow_id": workflow_id, "data": ["mine"]})
    told = [data for kind, data in heard(subscription) if kind in ("user_action", "job_retried")]
    stored = [event["data"] for event in api.get("/events", workflow_id=workflow_id)["items"]]
    assert [*told, ["mine"]] == stored
    assert [data.get("action") for data in told] == ["rerun_jobs", "rerun_jobs", None, "reset_job_status"]
    assert [data.get("jobs") for data in told] == ["a, b0 and 39 more", "a", None, None]


def test_a_queue_that_overflows_counts_what_it_drops(store, api):
    workflow_id, ids = make(api, {"a": [], **{f"b{number}": ["a"] for number in range(700)}})
    subscription, errors = store.subscribe(workflow_id, "info"), store.subscribe(workflow_id, "error")
    node = make_node(api, workflow_id)
    complete(api, ids["a"], workflow_id, node, code=1)
    events = heard(subscription)          # node, a, and 700 canceled
    assert len(events) == 513 and events[-1] == ("warning", {"dropped": 702 - 512})
    assert [kind for kind, _ in heard(errors)] == ["job_failed"]
    assert heard(subscription) == []


def test_a_database_file_has_no_stream(api):
    workflow_id, _ = make(api, {"a": []})
    with pytest.raises(torc.Invalid, match="streamed over HTTP: start torc-server"):
        api.get(f"/workflows/{workflow_id}/events/stream")


# ---- actions and explanations


def test_job_triggers_count_and_actions_have_one_winner(client):
    workflow_id, ids = make(client, {"a": [], "b": []})
    action = act(client, workflow_id, "on_jobs_complete", [ids["a"], ids["b"]])
    node = make_node(client, workflow_id)
    pending = f"/workflows/{workflow_id}/actions/pending"
    complete(client, ids["a"], workflow_id, node)
    assert client.get(pending) == []
    complete(client, ids["b"], workflow_id, node)
    due = client.get(pending, trigger_type=["on_jobs_complete", "x"])
    assert [item["id"] for item in due] == [action]
    claim = f"/workflows/{workflow_id}/actions/{action}/claim"
    assert client.post(claim, {"compute_node_id": node}) == {"success": True, "action_id": action}
    with pytest.raises(torc.Conflict):
        client.post(claim, {})
    assert client.get(pending) == []


def test_the_last_cancel_of_a_cascade_fires_the_completion_actions(api):
    workflow_id, ids = make(api, {"a": [], "b": ["a"]})
    for trigger, jobs in (("on_workflow_complete", None), ("on_jobs_complete", [ids["b"]])):
        act(api, workflow_id, trigger, jobs)
    complete(api, ids["a"], workflow_id, make_node(api, workflow_id), code=1)
    assert len(api.get(f"/workflows/{workflow_id}/actions/pending")) == 2


def test_why_names_the_cause(api):
    workflow_id, ids = make(api, {"bad": [], "b": ["bad"], "c": ["b"], "slow": [], "d": ["slow"],
                                  "big": []},
                            requirements=[{"name": "huge", "num_cpus": 64, "memory": "1m"}],
                            big={"resource_requirements_id": 1})
    sentence = lambda name: api.get(f"/jobs/{ids[name]}/why")["sentence"]  # noqa: E731
    assert sentence("slow") == (f"it is ready, but no runner is active on workflow {workflow_id}: "
                                f"torc run {workflow_id}")
    node = make_node(api, workflow_id)
    complete(api, ids["bad"], workflow_id, node, code=139)
    assert sentence("bad").startswith("it failed with return code 139 (SIGSEGV) on here (pid 1)")
    assert sentence("c") == (f'it was canceled because "bad" (job {ids["bad"]}), on which it '
                             "depends, failed")
    assert sentence("d") == f'it waits for "slow" (job {ids["slow"]}, ready)'
    assert sentence("big") == ('it needs 64 CPUs, the runner on here has 2 (resource requirements '
                               '"huge")')
    api.put(f"/compute_nodes/{api.page('/compute_nodes', workflow_id=workflow_id)['items'][0]['id']}",
            {"is_active": False})
    assert sentence("big").startswith("it needs 64 CPUs, the last runner, on here, had 2")


def test_unfinished_names_what_holds_a_workflow_up(api):
    workflow_id, ids = make(api, {"off": [], "child": ["off"]}, start=False)
    api.put(f"/jobs/{ids['off']}", {"status": "disabled"})
    api.post(f"/workflows/{workflow_id}/initialize_jobs")
    report = api.get(f"/workflows/{workflow_id}/unfinished")
    assert report["by_status"] == {"blocked": 1} and report["ready"] == []
    assert report["waiting"] == [{"job_id": ids["off"], "job_name": "off", "status": "disabled",
                                  "dependents": 1}]


# ==================================================================================================
# 8 Access
# ==================================================================================================

ALICE, BOB = "correct horse", "battery staple"


@pytest.fixture(scope="session")
def passwords(tmp_path_factory):
    """A password file with alice and bob, hashed as cheaply as bcrypt can."""
    file = torc.PasswordFile(str(tmp_path_factory.mktemp("passwords") / "users"), absent=True)
    for user, password in (("alice", ALICE), ("bob", BOB)):
        file.set(user, torc.hash_password(password, 4))
    file.write()
    return file.path


def basic(user, password):
    """An Authorization header."""
    import base64
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def checked(gate, header, address="10.0.0.1"):
    """The final Verdict of a gate."""
    verdict = gate.judge(header, address)
    if verdict.state != "unsure":
        return verdict
    answers = []
    gate.ask(header, address, verdict.digest, answers.append)
    until(lambda: answers)
    return answers[0]


def test_a_password_file_is_private_from_its_first_byte_and_keeps_comments_and_order(tmp_path):
    path = tmp_path / "users"
    path.write_text("# our users\n\nzoe:$2y$05$abc\nbob:$6$x$y\n# end\n")
    file = torc.PasswordFile(str(path))
    file.set("bob", "$2y$05$new")
    file.set("amy", "$2y$05$amy")
    file.write()
    assert path.read_text() == ("# our users\n\nzoe:$2y$05$abc\nbob:$2y$05$new\n# end\n"
                                "amy:$2y$05$amy\n")
    assert path.stat().st_mode & 0o777 == 0o600
    file.set("zoe", None)
    assert "zoe" not in file.users and not any(line.startswith("zoe") for line in file.lines)


@pytest.mark.parametrize("text, message", [
    ("alice", "line 1: expected USER:HASH"), (":x", "line 1: expected USER:HASH"),
    ("# c\nalice:$apr1$a$b", "line 2: the password of alice is stored as Apache's MD5"),
    ("alice:{SHA}x", "is stored as SHA-1"), ("alice:secret", "is stored as a plain or DES text"),
    ("", "has no users")])
def test_a_password_file_that_cannot_be_used_says_line_and_remedy(tmp_path, text, message):
    (tmp_path / "users").write_text(text)
    with pytest.raises(torc.Unreachable) as caught:
        torc.Gate(str(tmp_path / "users"))
    assert message in str(caught.value) and "secret" not in str(caught.value)
    with pytest.raises(torc.Unreachable, match="does not exist: torc-htpasswd add"):
        torc.Gate(str(tmp_path / "absent"))


@pytest.mark.parametrize("password", ["x", "grün ☃", "a" * 72])
def test_a_hash_is_of_its_own_password_only(password):
    hashed = torc.hash_password(password, 4)
    assert hashed.startswith("$2y$04$") and len(hashed) == 60
    assert torc.check_password(password, hashed) and not torc.check_password(password + "!", hashed) \
        or len(password) == 72
    assert not torc.check_password("", hashed) and not torc.check_password(password[:-1], hashed)
    assert torc.hash_password(password, 4) != hashed


@pytest.mark.parametrize("password", ["", "a" * 73, "a\0b"])
def test_bcrypt_takes_no_password_that_it_would_cut(password):
    with pytest.raises(torc.UsageError, match="1 to 72 bytes"):
        torc.hash_password(password, 4)
    assert not torc.check_password("a\0b", torc.hash_password("a", 4))


@pytest.mark.parametrize("flags", [["-B"], ["-B", "-C", "6"], ["-5"], ["-2"]])
def test_files_of_apache_are_taken_and_ours_by_apache(tmp_path, flags):
    program = shutil.which("htpasswd")
    if not program:
        pytest.skip("apache2-utils is not installed")
    path = str(tmp_path / "users")
    made = subprocess.run([program, "-c", "-b", *flags, path, "alice", ALICE], capture_output=True)
    if made.returncode:
        pytest.skip(f"this htpasswd has no {flags[0]}")
    gate = torc.Gate(path)
    assert checked(gate, basic("alice", ALICE)).user == "alice"
    assert checked(gate, basic("alice", "wrong")).state == "wrong"
    file = torc.PasswordFile(path)
    file.set("bob", torc.hash_password(BOB, 5))
    file.write()
    assert subprocess.run([program, "-v", "-b", path, "bob", BOB], capture_output=True).returncode == 0


@pytest.mark.parametrize("header", [None, "", "Basic", "Basic ", "Basic !!!", "Bearer x",
                                    "Basic YWJj", "Basic /w=="])
def test_what_is_no_basic_header_is_nobody(passwords, header):
    assert torc.Gate(passwords).judge(header, "10.0.0.1") == torc.NOBODY


def test_a_password_is_hashed_once_and_wrong_ones_never_again(passwords, monkeypatch):
    gate = torc.Gate(passwords)
    hashed = []
    check = torc.check_password
    monkeypatch.setattr(torc, "check_password",
                        lambda password, text: hashed.append(1) or check(password, text))
    for _ in range(3):
        assert checked(gate, basic("alice", ALICE)) == torc.Verdict("known", "alice")
        assert checked(gate, basic("alice", f"wrong {len(hashed)}")).state == "wrong"
        assert checked(gate, basic("bob", "wrong")).state == "wrong"
        assert checked(gate, basic("nobody", "wrong")).state == "wrong"
    assert len(hashed) == 2               # alice's right one, bob's wrong one
    assert ALICE not in repr(vars(gate)) and ALICE.encode() not in repr(gate.proven).encode()


def test_a_cached_password_is_hashed_again_when_its_time_is_over(passwords, monkeypatch):
    gate = torc.Gate(passwords, ttl_s=0)
    assert checked(gate, basic("alice", ALICE)).user == "alice"
    assert gate.judge(basic("alice", ALICE), "10.0.0.1").state == "unsure"
    assert checked(gate, basic("alice", ALICE)).user == "alice"


def test_wrong_passwords_are_told_later_and_later_and_the_right_one_at_once(passwords):
    gate = torc.Gate(passwords)
    delays = [checked(gate, basic("alice", f"wrong {number}")).delay_s for number in range(9)]
    assert delays == sorted(delays) and 0 < delays[0] <= 0.1 and delays[-1] == torc.MAX_DELAY_S
    assert checked(gate, basic("alice", "wrong"), "10.0.0.2").delay_s == delays[0]
    assert checked(gate, basic("alice", ALICE)) == torc.Verdict("known", "alice")


def test_wrong_passwords_are_logged_ten_a_minute(passwords, monkeypatch):
    told, clock = [], [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    gate = torc.Gate(passwords, warn=told.append)
    for number in range(25):
        gate.wrong("alice\n", "10.0.0.1", clock[0])
    assert told == ["wrong password for user alice from 10.0.0.1"] * torc.MAX_LOGGED
    clock[0] += 61
    gate.wrong("bob", "10.0.0.2", clock[0])
    assert told[torc.MAX_LOGGED:] == ["wrong passwords: 15 more within a minute",
                                      "wrong password for user bob from 10.0.0.2"]


def test_a_flood_of_guesses_delays_its_own_lane_only(passwords, monkeypatch):
    gate = torc.Gate(passwords)
    go, order = threading.Event(), []

    def check(password, hashed):
        go.wait(20)
        order.append(password)
        return password in (ALICE, BOB)

    monkeypatch.setattr(torc, "check_password", check)
    answers = []

    def ask(user, password, address):
        header = basic(user, password)
        gate.ask(header, address, gate.judge(header, address).digest, answers.append)

    for number in range(torc.LANE_QUEUE + 5):
        ask("alice", f"guess {number}", "10.0.0.1")
    assert [answer.state for answer in answers] == ["busy"] * (len(answers)) and len(answers) >= 3
    ask("bob", BOB, "10.0.0.1"), ask("alice", ALICE, "10.0.0.2")
    go.set()
    until(lambda: sum(answer.state == "known" for answer in answers) == 2)
    assert max(order.index(BOB), order.index(ALICE)) < 12


def test_the_same_question_asked_often_costs_one_hash(passwords, monkeypatch):
    gate = torc.Gate(passwords)
    go, hashed, answers = threading.Event(), [], []
    monkeypatch.setattr(torc, "check_password",
                        lambda *_: go.wait(20) and not hashed.append(1))
    header = basic("alice", ALICE)
    for _ in range(50):
        gate.ask(header, "10.0.0.1", gate.judge(header, "10.0.0.1").digest, answers.append)
    go.set()
    until(lambda: len(answers) == 50)
    assert len(hashed) == 1 and {answer.user for answer in answers} == {"alice"}


def test_a_changed_password_file_is_read_again_and_a_bad_line_costs_itself_alone(passwords, tmp_path):
    path = str(tmp_path / "users")
    shutil.copy(passwords, path)
    warnings = []
    gate = torc.Gate(path, warn=warnings.append)
    assert checked(gate, basic("alice", ALICE)).user == "alice"
    file = torc.PasswordFile(path)
    file.set("alice", torc.hash_password("another password", 4))
    file.write()
    gate.looked -= 2                      # it looks once a second
    assert checked(gate, basic("alice", ALICE)).state == "wrong"
    assert checked(gate, basic("alice", "another password")).user == "alice"
    good, bob = Path(path).read_text(), checked(gate, basic("bob", BOB)).user
    for text, users, told in (
            ("nonsense\n" + good, {"alice", "bob"}, "has changed: 2 users; .*line 1: expected USER:HASH"),
            ("nonsense\n" + good.splitlines()[0], {"alice"}, "1 user; .*line 1"),
            ("", set(), "has changed: 0 users"), (good, {"alice", "bob"}, "2 users"),
            (None, set(), "is gone: 0 users")):
        Path(path).unlink() if text is None else Path(path).write_text(text)
        gate.looked -= 2
        assert {checked(gate, basic(user, word)).user for user, word in (
            ("alice", "another password"), ("bob", BOB))} - {None} == users and bob == "bob"
        changes = [warning for warning in warnings if "wrong password" not in warning]
        assert re.search(told, changes[-1])
    assert len(changes) == 6


def test_the_word_basic_may_be_in_any_case(passwords):
    gate = torc.Gate(passwords)
    assert {checked(gate, header.replace("Basic", word)).user for header in [basic("alice", ALICE)]
            for word in ("Basic", "basic", "BASIC", "bAsIc")} == {"alice"}


def test_admins_are_those_the_server_was_told(store):
    torc.set_admins(store, ["amy", "zoe"])
    torc.set_admins(store, ["zoe"])
    assert torc.admins(store) == ["zoe"]


# ==================================================================================================
# 9 API
# ==================================================================================================


def sample(kind):
    """A body with a value for every field of a kind that a client may set."""
    return {field.name: {"memory": "2g", "name": "a name"}.get(field.name, valid_value(field))
            for field in kind.fields if not field.server and field.type != "ids"}


@pytest.mark.parametrize("table", [table for table in torc.KINDS if table not in ("workflow", "job")])
def test_every_kind_round_trips(client, table):
    kind = torc.KINDS[table]
    workflow_id, ids = make(client, {"a": []})
    body = {**sample(kind), "workflow_id": workflow_id}
    body.update({name: value for name, value in {
        "job_id": ids["a"], "compute_node_id": table == "result" and make_node(client, workflow_id),
    }.items() if name in body})
    created = client.post(kind.path, body)
    expected = {**body, "id": created["id"]}
    if "get" not in kind.ops:
        listed = client.page(kind.path, workflow_id=workflow_id, limit=2**40)
        assert listed["items"] == [expected] and listed["max_limit"] == 100_000
        return
    read = client.get(f"{kind.path}/{created['id']}")
    expected = {name: value for name, value in expected.items()
                if name not in [field.name for field in kind.fields if field.type == "echo"]}
    if table == "event":
        expected["timestamp"] = read["timestamp"]
    if table == "result":                 # of a job that asks for nothing
        expected.update(asked_memory=0, asked_runtime=0)
    assert read == expected
    path = f"/workflows/{workflow_id}{kind.path}" if table == "failure_handler" else kind.path
    listed = client.page(path, workflow_id=workflow_id, include_stderr=True)
    assert read in listed["items"] and listed["max_limit"] == 100_000
    assert client.delete(f"{kind.path}/{created['id']}") == read
    with pytest.raises(torc.NotFound):
        client.get(f"{kind.path}/{created['id']}")


def test_records_do_not_refer_to_those_of_another_workflow(client):
    mine, my = make(client, {"a": []})
    theirs, their = make(client, {"b": []})
    node = make_node(client, theirs)
    need = client.post("/resource_requirements", {"workflow_id": theirs, "name": "r", "num_cpus": 1,
                                                  "memory": "1g", "runtime": "PT1M"})["id"]
    file = client.post("/files", {"workflow_id": theirs, "name": "f", "path": "f"})["id"]
    job = {"workflow_id": mine, "name": "x", "command": "true"}
    result = {"workflow_id": mine, "job_id": my["a"], "run_id": 1, "compute_node_id": node,
              "return_code": 0, "exec_time_minutes": 1.0, "completion_time": torc.iso_time(0),
              "status": "completed"}
    before = client.get("/jobs", workflow_id=mine)["total_count"]
    for method, path, body in (
            ("post", "/jobs", {**job, "depends_on_job_ids": [their["b"]]}),
            ("post", "/jobs", {**job, "resource_requirements_id": need}),
            ("post", "/bulk_jobs", {"jobs": [job, {**job, "name": "y", "input_file_ids": [file]}]}),
            ("put", f"/jobs/{my['a']}", {"resource_requirements_id": need}),
            ("post", "/results", {**result, "job_id": their["b"]}),
            ("post", "/slurm_stats", {"workflow_id": mine, "job_id": their["b"], "run_id": 1,
                                      "attempt_id": 1}),
            ("post", f"/workflows/{mine}/actions", {
                "workflow_id": mine, "trigger_type": "on_jobs_ready", "action_type": "run_commands",
                "action_config": {"commands": ["true"]}, "job_ids": [their["b"]]})):
        with pytest.raises(torc.Invalid, match=f"belongs to workflow {theirs}, not to workflow {mine}"):
            getattr(client, method)(path, body)
    with pytest.raises(torc.Invalid, match="belongs to workflow"):
        client.post("/user_data", {"workflow_id": mine, "name": "u"}, consumer_job_id=their["b"])
    assert client.post("/results", result)["compute_node_id"] == node    # as clients of Torc do
    assert client.get("/jobs", workflow_id=mine)["total_count"] == before
    assert statuses(client, theirs) == {"b": "ready"}


def test_a_put_changes_only_what_it_names(client):
    workflow_id, _ = make(client, {})
    made = client.post("/slurm_schedulers", {"workflow_id": workflow_id, "name": "s", "account": "a",
                                             "nodes": 1, "walltime": "01:00:00", "qos": "high"})
    other, _ = make(client, {})
    changed = client.put(f"/slurm_schedulers/{made['id']}", {"nodes": 4, "workflow_id": other})
    assert changed == {**made, "nodes": 4}


@pytest.mark.parametrize("method, path, query, body, error, text", [
    ("GET", "/jobs", {}, None, torc.BadRequest, "workflow_id is missing"),
    ("GET", "/jobs", {"workflow_id": "x"}, None, torc.BadRequest, "'x' is not an integer"),
    ("GET", "/jobs", {"workflow_id": 1, "limit": ""}, None, torc.BadRequest, "limit='' is not"),
    ("GET", "/jobs", {"workflow_id": [1, 2]}, None, torc.BadRequest, "given 2 times"),
    ("GET", "/jobs", {"workflow_id": 1, "status": "odd"}, None, torc.BadRequest, "a job status"),
    ("GET", "/jobs", {"workflow_id": 1, "reverse_sort": "yes"}, None, torc.BadRequest, "true or"),
    ("GET", "/jobs", {"workflow_id": 1, "limit": 100_001}, None, torc.BadRequest, "an integer of at most 100000"),
    ("GET", "/jobs", {"workflow_id": 99}, None, torc.NotFound, "Workflow not found"),
    ("GET", "/jobs/abc", {}, None, torc.BadRequest, "'abc' in the path is not an integer"),
    ("GET", "/jobs/99", {}, None, torc.NotFound, "Job not found"),
    ("POST", "/jobs", {}, {"workflow_id": 1, "name": "x"}, torc.Invalid, "missing field `command`"),
    ("POST", "/jobs", {}, {"workflow_id": 1.0, "name": "x", "command": "c"}, torc.Invalid,
     "1.0 is not an integer"),
    ("POST", "/jobs", {}, {"workflow_id": True, "name": "x", "command": "c"}, torc.Invalid,
     "True is not an integer"),
    ("POST", "/jobs", {}, {"workflow_id": 1, "name": 5, "command": "c"}, torc.Invalid, "not a string"),
    ("POST", "/jobs", {}, {"workflow_id": 1, "name": "x", "command": "c", "priority": -1},
     torc.Invalid, "priority: -1 is not an integer of at least 0"),
    ("POST", "/jobs", {}, {"workflow_id": 1, "name": "x", "command": "c", "depends_on_job_ids": [99]},
     torc.Invalid, "job 99 does not exist"),
    ("POST", "/jobs", {}, [], torc.Invalid, "not a JSON object"),
    ("POST", "/bulk_jobs", {}, {"jobs": [{"workflow_id": 1, "name": "x", "command": "c"},
                                         {"workflow_id": 2, "name": "x", "command": "c"}]},
     torc.Invalid, "different workflows"),
    ("POST", "/resource_requirements", {}, {"workflow_id": 1, "name": "default"}, torc.Invalid,
     "reserved"),
    ("POST", "/resource_requirements", {}, {"workflow_id": 1, "name": "r", "memory": "1gb"},
     torc.Invalid, "memory: '1gb' is not a size"),
    ("POST", "/resource_requirements", {}, {"workflow_id": 1, "name": "r", "num_nodes": 0},
     torc.Invalid, "num_nodes: 0 is not an integer of at least 1"),
    ("POST", "/workflows/1/actions", {}, {"trigger_type": "on_workflow_start", "action_type": "run_commands",
                                          "action_config": {"commands": [""]}}, torc.Invalid,
     "command lines"),
    ("POST", "/jobs/1/retry/1", {}, None, torc.BadRequest, "max_retries is missing"),
    ("PUT", "/jobs/1/start_job/1/1", {}, None, torc.Invalid, "not pending"),
    ("PUT", "/jobs/99/manage_status_change/completed/1", {}, None, torc.Invalid, "complete_job only"),
    ("GET", "/jobs/1/nothing", {}, None, torc.NotFound, "/jobs/1/nothing"),
])
def test_bad_requests_are_refused_with_the_value(client, method, path, query, body, error, text):
    make(client, {"a": []})
    before = client.get("/workflows/1/counts")
    with pytest.raises(error, match=re.escape(text)):
        client.request(method, path, query, body)
    assert client.get("/workflows/1/counts") == before


def test_job_updates_follow_upstreams_rules(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"]}, start=False)
    job = client.get(f"/jobs/{ids['b']}")
    assert client.put(f"/jobs/{ids['b']}", job) == job       # unchanged values are always fine
    assert client.put(f"/jobs/{ids['b']}", {"command": "new", "priority": 4})["command"] == "new"
    with pytest.raises(torc.Invalid, match="immutable"):
        client.put(f"/jobs/{ids['b']}", {"status": "ready"})
    with pytest.raises(torc.Invalid, match="immutable"):
        client.put(f"/jobs/{ids['b']}", {"input_file_ids": [1]})
    client.post(f"/workflows/{workflow_id}/initialize_jobs")
    with pytest.raises(torc.Invalid, match="uninitialized, and it is blocked$"):
        client.put(f"/jobs/{ids['b']}", {"name": "other"})
    client.post(f"/jobs/{ids['b']}/stop", status="canceled")
    with pytest.raises(torc.Invalid, match="it is canceled; to reset what failed: torc workflows reset-status "):
        client.put(f"/jobs/{ids['b']}", {"name": "other"})
    assert client.put(f"/jobs/{ids['b']}", {"invocation_script": "nice"})["invocation_script"]


def test_lists_are_paged_sorted_and_filtered(client):
    workflow_id, ids = make(client, {f"j{number}": [] for number in range(7)})
    page = client.page("/jobs", workflow_id=workflow_id, offset=2, limit=3, reverse_sort=True)
    assert [job["name"] for job in page["items"]] == ["j4", "j3", "j2"]
    assert (page["offset"], page["count"], page["total_count"], page["has_more"]) == (2, 3, 7, True)
    assert client.page("/jobs", workflow_id=workflow_id, limit=0)["has_more"]
    assert client.page("/jobs", workflow_id=workflow_id, limit=-1)["count"] == 7
    assert client.page("/jobs", workflow_id=workflow_id, offset=-5)["count"] == 7
    assert client.page("/jobs", workflow_id=workflow_id, sort_by="nonsense")["count"] == 7
    assert client.page("/jobs", workflow_id=workflow_id, status="blocked")["count"] == 0
    assert len(list(client.items("/jobs", workflow_id=workflow_id, limit=5, offset=1))) == 5


def test_a_large_list_has_the_same_records_as_small_pages(client):
    workflow_id, _ = make(client, {f"j{number}": [] for number in range(600)},
                          j7={"invocation_script": "a \"quoted\" é\n", "priority": 3})
    whole = client.page("/jobs", workflow_id=workflow_id)["items"]
    pages = [client.page("/jobs", workflow_id=workflow_id, limit=100, offset=start)["items"]
             for start in range(0, 600, 100)]
    assert whole == sum(pages, []) and len(whole) == 600


def test_deleting_requirements_deletes_their_jobs_and_frees_what_waited(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"]},
                            requirements=[{"name": "r", "num_cpus": 1, "memory": "1m"}],
                            a={"resource_requirements_id": 1})
    need = client.get(f"/jobs/{ids['a']}")["resource_requirements_id"]
    assert client.delete(f"/resource_requirements/{need}")["name"] == "r"
    assert statuses(client, workflow_id) == {"b": "ready"}


def test_bulk_jobs_answer_in_order_with_consecutive_ids(client):
    workflow_id, _ = make(client, {})
    jobs = client.post("/bulk_jobs", {"jobs": [{"workflow_id": workflow_id, "name": f"n{number}",
                                                "command": "c"} for number in range(1500)]})["jobs"]
    assert [job["name"] for job in jobs] == [f"n{number}" for number in range(1500)]
    assert [job["id"] for job in jobs] == list(range(jobs[0]["id"], jobs[0]["id"] + 1500))
    assert client.post("/bulk_jobs", {"jobs": []}) == {"jobs": []}


def test_workflow_defaults_appear_on_get_and_the_echo_stays_an_echo(client):
    made = client.post("/workflows", {"name": "w", "user": "u"})
    assert set(made) == {"id", "name", "user", "status_id", "timestamp"}
    read = client.get(f"/workflows/{made['id']}")
    assert read["compute_node_wait_for_new_jobs_seconds"] == 90
    assert read["compute_node_ignore_workflow_completion"] is False
    assert read["compute_node_wait_for_healthy_database_minutes"] == 20
    assert "description" not in read
    status = client.get(f"/workflows/{made['id']}/status")
    assert status["run_id"] == 0 and status["is_canceled"] is False
    needs = client.get("/resource_requirements", workflow_id=made["id"])["items"]
    assert [(item["name"], item["memory"], item["runtime"]) for item in needs] == [
        ("default", "1m", "P0DT1M")]


def test_opaque_texts_come_back_byte_for_byte(client):
    text = '{"a" :  [1.0, "é\\u00e9"] }'
    made = client.post("/workflows", {"name": "w", "user": "u", "metadata": text,
                                      "slurm_defaults": text})
    read = client.get(f"/workflows/{made['id']}")
    assert read["metadata"] == read["slurm_defaults"] == text


def test_required_files_and_missing_user_data(client):
    payload = {"workflow": {"name": "w", "user": "u"},
               "files": [{"name": "in", "path": "in"}, {"name": "mid", "path": "mid"},
                         {"name": "unused", "path": "x"}],
               "user_data": [{"name": "set", "data": 1}, {"name": "unset"}],
               "jobs": [{"name": "a", "command": "c", "input_file_ids": [1], "output_file_ids": [2],
                         "input_user_data_ids": [1, 2]},
                        {"name": "b", "command": "c", "input_file_ids": [2]}]}
    workflow_id = client.post("/workflow_specs", payload)["id"]
    assert client.get(f"/workflows/{workflow_id}/required_existing_files") == {"files": [1]}
    assert client.get(f"/workflows/{workflow_id}/missing_user_data") == {"user_data": [2]}
    rows = client.get(f"/workflows/{workflow_id}/job_file_relationships")["items"]
    assert [(row["file_name"], row.get("producer_job_name"), row.get("consumer_job_name"))
            for row in rows] == [("in", None, "a"), ("mid", "a", "b"), ("unused", None, None)]


def test_an_interrupted_creation_does_not_leave_half_a_workflow(client):
    for broken in ({"depends_on_job_ids": [7]}, {"input_file_ids": [1]}, {"resource_requirements_id": 3},
                   {"priority": -2}, {"name": None}):
        with pytest.raises(torc.TorcError):
            client.post("/workflow_specs", {
                "workflow": {"name": "w", "user": "u"},
                "jobs": [{"name": "ok", "command": "c"}, {"name": "x", "command": "c", **broken}]})
    assert client.page("/workflows")["total_count"] == 0
    assert client.post("/workflows", {"name": "w", "user": "u"})["id"] == 1


def test_no_error_text_makes_an_upstream_runner_wait(client):
    """Words that upstream's runner takes for an outage must not occur in ordinary refusals."""
    make(client, {"a": []})
    for method, path, body in (("GET", "/jobs/99", None), ("POST", "/jobs", {}),
                               ("POST", "/jobs/1/complete_job/ready/1", {
                                   "job_id": 1, "workflow_id": 1, "run_id": 1, "compute_node_id": 1,
                                   "return_code": 0, "exec_time_minutes": 1, "completion_time": "x",
                                   "status": "completed"}),
                               ("PUT", "/jobs/1/start_job/5/1", None)):
        with pytest.raises(torc.TorcError) as caught:
            client.request(method, path, {}, body)
        assert not re.search("connection|timeout|network|dns|resolve|unreachable",
                             str(caught.value).lower())


@pytest.mark.parametrize("field", ["execution_config", "resource_monitor_config", "slurm_defaults", "metadata"])
def test_the_four_json_fields_are_checked_and_taken_as_objects_too(client, field):
    workflow_id = client.post("/workflows", {"name": "w", "user": "u"})["id"]
    good = {"mode": "direct"} if field == "execution_config" else {"enabled": True}
    assert json.loads(client.put(f"/workflows/{workflow_id}", {field: good})[field]) == good
    text = json.dumps(good, indent=2)
    assert client.put(f"/workflows/{workflow_id}", {field: text})[field] == text
    bad = ["nope", "", 5, [1], "[1", {"x": float("nan")}] + (
        [{"mode": "fast"}, '{"oom_exit_code": "x"}', "5"] if field == "execution_config" else [])
    for value in bad:
        with pytest.raises((torc.Invalid, torc.BadRequest, ValueError)):
            client.put(f"/workflows/{workflow_id}", {field: value})
    assert client.get(f"/workflows/{workflow_id}")[field] == text
    for view in ("summary", "failures", "usage", "timeline"):
        client.get(f"/workflows/{workflow_id}/{view}")


@pytest.mark.parametrize("field, hint", [
    ("depends_on", "depends_on_job_ids takes ids"), ("depend_on_job_ids", 'did you mean "depends_on_job_ids"?'),
    ("comand", 'did you mean "command"?'),
    ("labels", "of Torc 1.0")])
def test_a_field_that_is_not_known_is_refused_with_the_nearest(client, field, hint):
    workflow_id, ids = make(client, {"a": []})
    body = {"workflow_id": workflow_id, "name": "x", "command": "c"}
    with pytest.raises(torc.Invalid) as caught:
        client.post("/jobs", {**body, field: [ids["a"]]})
    assert f"unknown field {field!r}" in str(caught.value) and hint in str(caught.value)
    assert client.post("/jobs", {**body, field: None})["name"] == "x"    # null says nothing


def test_all_that_is_wrong_with_a_body_is_told_together(client):
    workflow_id, _ = make(client, {})
    with pytest.raises(torc.Invalid) as caught:
        client.post("/jobs", {"workflow_id": workflow_id, "name": 5, "priority": -1, "x": 1})
    assert str(caught.value) == ("name: 5 is not a string; priority: -1 is not an integer of at least 0; "
                                 "unknown field 'x'; missing field `command`")


def test_two_jobs_of_one_name_are_refused(client):
    workflow_id, ids = make(client, {"a": [], "b": []}, start=False)
    for path, body in (("/jobs", {"workflow_id": workflow_id, "name": "a", "command": "c"}),
                       ("/bulk_jobs", {"jobs": [{"workflow_id": workflow_id, "name": "x", "command": "c"}] * 2})):
        with pytest.raises(torc.Conflict, match=f"is used twice in workflow {workflow_id}"):
            client.post(path, body)
    with pytest.raises(torc.Conflict, match='job name "b" is taken'):
        client.put(f"/jobs/{ids['a']}", {"name": "b"})
    assert set(statuses(client, workflow_id)) == {"a", "b"}


@pytest.mark.parametrize("path, body, error, text", [
    ("/local_schedulers", {"workflow_id": 1, "num_cpus": 1}, torc.Invalid, "missing field `memory`"),
    ("/slurm_schedulers", {"workflow_id": 1, "account": "a", "nodes": 1, "walltime": "1"}, torc.Invalid,
     "missing field `name`"),
    ("/jobs", {"workflow_id": 1, "name": "x", "command": "c", "resource_requirements_id": 99}, torc.Invalid,
     "resource_requirements_id: resource requirements 99 does not exist"),
    ("/jobs", {"workflow_id": 1, "name": "x", "command": "c", "scheduler_id": 1}, torc.Invalid,
     "scheduler_id: Slurm scheduler 1 belongs to workflow 2, not to workflow 1"),
    ("/workflows/1/actions/1/claim", {"compute_node_id": 77}, torc.Invalid, "compute node 77 does not exist"),
    ("/workflows/1/actions", {"trigger_type": "on_moon", "action_type": "run_commands", "action_config": {
        "commands": ["x"]}}, torc.Invalid, "trigger_type: 'on_moon' is not one of on_workflow_start"),
    ("/workflows/1/actions", {"trigger_type": "on_workflow_start", "action_type": "fly", "action_config": {}},
     torc.Invalid, "action_type: 'fly' is not one of run_commands, schedule_nodes"),
    ("/workflows/1/rerun_jobs", [1], torc.Invalid, "the body is list, not a JSON object"),
    ("/workflows/1/rerun_jobs", {"jobs": [1]}, torc.Invalid, "jobs: 1 is not an object"),
    ("/workflows/1/runner_step", {"compute_node_id": 1, "step": 1, "claim": {"limit": 1, "bins": [[1, 1, 0]]}},
     torc.Invalid, "missing field `whole`"),
    ("/workflows/1/runner_step", {"compute_node_id": 1, "step": 1, "completions": [{
        "job_id": 1, "run_id": 1, "attempt_id": 1, "status": "completed", "return_code": 0, "exec_time_minutes": 1,
        "completion_time": "2026-01-02T03:04:05Z", "output_files": [{}]}]}, torc.Invalid,
     "missing field `id`; missing field `st_mtime`"),
    ("/jobs", {"workflow_id": 1, "name": "\ud800", "command": "c"}, torc.Invalid, "is not a string"),
    ("/user_data", {"workflow_id": 1, "name": "u", "data": {"x": ["\ud800"]}}, torc.Invalid, "not a JSON value"),
    ("/files", {"workflow_id": 1, "name": "f", "path": "p", "st_mtime": 10**400}, torc.Invalid, "not a number"),
    ("/results", {"workflow_id": 1, "job_id": 1, "run_id": 1, "compute_node_id": 1, "return_code": 0,
                  "exec_time_minutes": 1, "completion_time": "2026-19-39T29:59:59Z", "status": "failed"},
     torc.Invalid, "completion_time: '2026-19-39T29:59:59Z' is not a time"),
])
def test_what_a_body_must_not_have_is_refused_with_its_name(client, path, body, error, text):
    mine, _ = make(client, {"a": []})
    make_node(client, mine)
    theirs, _ = make(client, {"b": []})
    client.post("/slurm_schedulers", {"workflow_id": theirs, "name": "s", "account": "a", "nodes": 1,
                                      "walltime": "01:00:00"})
    act(client, mine, "on_jobs_ready", [1])
    with pytest.raises(error, match=text):
        client.post(path, body)


def test_times_are_sorted_by_what_they_mean(client):
    workflow_id, ids = make(client, {name: [] for name in "abc"})
    node = make_node(client, workflow_id)
    for name, text in (("a", "2026-01-02T12:00:00+09:00"), ("b", "2026-01-02T02:00:00Z"),
                       ("c", "2026-01-02T02:30:00.5Z")):
        client.post("/results", {"workflow_id": workflow_id, "job_id": ids[name], "run_id": 1, "status": "failed",
                                 "compute_node_id": node, "return_code": 1, "exec_time_minutes": 1,
                                 "completion_time": text})
    names = {number: name for name, number in ids.items()}
    rows = client.get("/results", workflow_id=workflow_id, sort_by="completion_time")["items"]
    assert [names[row["job_id"]] for row in rows] == ["b", "c", "a"]


def test_a_list_that_is_read_in_pages_passes_over_nothing_while_records_go(client, monkeypatch):
    monkeypatch.setattr(torc, "PAGE_SIZE", 3)
    workflow_id, ids = make(client, {f"j{number}": [] for number in range(10)})
    seen = []
    for job in client.items("/jobs", workflow_id=workflow_id):
        seen.append(job["name"])
        if len(seen) in (2, 5):           # what was read already goes, and the rest moves up
            client.delete(f"/jobs/{ids[seen[0] if len(seen) == 2 else seen[3]]}")
    assert seen == list(ids)


def test_pages_of_a_server_that_does_not_know_after_id_are_read_by_offset(api, monkeypatch):
    monkeypatch.setattr(torc, "PAGE_SIZE", 3)
    workflow_id, ids = make(api, {f"j{number}": [] for number in range(8)})
    real = api.get
    monkeypatch.setattr(api, "get", lambda path, **query: real(path, **{
        name: value for name, value in query.items() if name != "after_id"}))
    assert [job["name"] for job in api.items("/jobs", workflow_id=workflow_id)] == list(ids)


# ---- anything in any field

ODD = [None, True, 0, -1, 1, 2**31, 2**63, -2**70, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "1",
       "\0", "\ud800", "é" * 9, "x" * 100_000, "2026-19-39T29:59:59Z", "completed", "nope", "[1]", "{}", [], [[]], {}, [1],
       [None], ["x"], [{}], [[1, 2]], [[1, 2, 3]], {"x": {}}, {"commands": ["x"]}, {"mode": 5}, [10**30]]


DEEP = "a list in a list in a list"       # stands for 100,000 of them


def odd_requests(seed):
    """(method, path, query, body) of requests with an odd value in some place, for ever."""
    chance = random.Random(seed)
    while True:
        method, path, *_ = chance.choice(torc.ROUTES)
        if path.endswith("/stream"):
            continue
        query, body = valid_request(method, path, chance.random() < 0.5)
        query.pop("wait_s", None)
        place = re.sub(r"<[^>]+>", lambda match: chance.choice(
            ["1", "1", "2", "0", "-1", "99", str(2**63), "x", "completed", "ready", "%ED%A0%80", "a%00b"])
            if chance.random() < 0.3 else place_of(match[0]), path)
        for target in (query, body if isinstance(body, dict) else {}):
            for name in list(target):
                if chance.random() < 0.4:
                    target[name] = chance.choice([*ODD, DEEP])
            if chance.random() < 0.1:
                target[chance.choice(["limit", "offset", "sort_by", "reverse_sort", "zzz", "workflow_id", "search",
                                      "env", "\ud800"])] = chance.choice(ODD)
        if body is not None and chance.random() < 0.1:
            body = chance.choice([*ODD, DEEP])
        yield method, place, query, body


@pytest.mark.slow
def test_no_value_in_any_field_is_a_fault_of_the_server(tmp_path):
    """For a minute: no 500 but for reload-auth, no traceback, and what is refused changes nothing."""
    server = Server(tmp_path / "x.db", 0, "--log-level", "info")
    client = server.client()
    workflow_id, ids = make(client, {"a": [], "b": ["a"], "c": []})
    make_node(client, workflow_id), act(client, workflow_id, "on_jobs_ready", [ids["a"]])
    for kind in torc.KINDS.values():
        if kind.table not in ("workflow", "job", "result"):
            client.post(kind.path, {**sample(kind), "workflow_id": workflow_id})
    reader = sqlite3.connect(server.database)
    state = lambda: reader.execute("PRAGMA data_version").fetchone()  # noqa: E731
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    before, count, deadline = state(), 0, time.monotonic() + 60
    from urllib.parse import quote
    for method, path, query, body in odd_requests(random.randrange(10**9)):
        if time.monotonic() > deadline:
            break
        pairs = [(name, item) for name, value in query.items()
                 for item in (value if isinstance(value, list) else [value]) if item is not None]
        target = torc.API_PREFIX + path + "?" + "&".join(
            f"{quote(name, errors='surrogatepass')}=" + quote(
                str(item).lower() if isinstance(item, bool) else str(item)[:5000], errors="surrogatepass")
            for name, item in pairs)
        data = None if body is None else json.dumps(body).replace(
            f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).encode()
        connection.request(method, target, data, {} if data is None else {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text, count = answer.read(), count + 1
        said = f"{method} {target[:300]} {(data or b'')[:300]} -> {answer.status} {text[:300]}"
        assert answer.status < 500 or path == "/admin/reload-auth" and answer.status == 500, said
        assert b"the store refuses" not in text, said
        after = state()
        assert answer.status < 400 or after == before, f"refused, but the database has changed: {said}"
        before = after
    reader.close()
    log = server.stop()[1]
    assert "Traceback" not in log and count > 1000, count
    store = torc.Store(server.database)
    check_store(store)
    store.close()


UPSTREAM_RECORDS = re.compile(r"/(workflows|jobs|bulk_jobs|files|user_data|resource_requirements|"
                              r"failure_handlers|slurm_schedulers|compute_nodes|events|results|"
                              r"scheduled_compute_nodes|ping|version)")


def test_every_filter_of_a_kind_has_a_condition():
    unknown = [(kind.table, field.name) for kind in torc.KINDS.values() for field in kind.filters
               if torc.conditions(kind, {field.name: "1"})[0] == "1"]
    assert unknown == [("result", "include_stderr")]      # which leaves a column out


def test_the_table_of_routes_has_no_double_and_every_route_a_docstring():
    seen = [(method, path) for method, path, *_ in torc.ROUTES]
    assert len(seen) == len(set(seen))
    assert all(getattr(function, "func", function).__doc__ for _, _, function, *_ in torc.ROUTES)


# ==================================================================================================
# 10 Client
# ==================================================================================================


def free_port():
    """A port on which nothing listens just now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_a_refused_connection_says_what_to_do():
    port = free_port()
    with pytest.raises(torc.Unreachable, match=rf"no server answers at 127.0.0.1:{port} "
                                               r"\(connection refused\); .* torc server starts one$"):
        torc.Client(f"http://127.0.0.1:{port}").get("/ping")


def test_an_unknown_host_name_is_named():
    with pytest.raises(torc.Unreachable, match="no-such-host.invalid:1: this machine cannot resolve the name"):
        torc.Client("http://no-such-host.invalid:1").get("/ping")


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://h:99999", "http://h:x",
                                 "http://me:secret@h:1"])
def test_what_is_no_server_url_is_a_usage_error(url):
    with pytest.raises(torc.UsageError, match="is not a server URL") as caught:
        torc.Client(url)
    assert "secret" not in str(caught.value)


@contextlib.contextmanager
def answering(data):
    """A listener that answers every connection with fixed bytes."""
    sock = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = sock.accept()
                connection.recv(65536)
                connection.sendall(data)
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    sock.close()


@pytest.mark.parametrize("data, message", [
    (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\nhello",
     "is a Torc server there"),
    (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "is a Torc server there"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "the answer is not HTTP"),
    (b"", "broke"),
])
def test_another_program_on_the_port_is_told_from_a_server(data, message):
    with answering(data) as url, pytest.raises(torc.Unreachable, match=message):
        torc.Client(url).get("/ping")


def test_a_server_that_moved_to_another_port_is_found_again(tmp_path):
    first = Server(tmp_path / "x.db")
    client = first.client()
    make(client, {"a": []})
    first.kill()
    second = Server(tmp_path / "x.db")
    assert second.port != first.port
    assert client.page("/workflows")["total_count"] == 1 and client.address.port == second.port
    second.stop()
    with pytest.raises(torc.Unreachable):
        client.get("/ping")


def test_a_note_of_another_database_is_not_followed(tmp_path):
    first, other = Server(tmp_path / "x.db"), Server(tmp_path / "other.db")
    client = first.client()
    server_id = client.server_id()
    first.kill()
    path = torc.server_note(server_id)
    note = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**note, "urls": [other.url]}))
    with pytest.raises(torc.Unreachable):
        client.get("/ping")


def test_the_note_is_private_and_goes_with_its_server(server):
    path = Path(torc.server_note(server.client().server_id()))
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    note = json.loads(path.read_text())
    assert note["urls"][0] == server.url and note["pid"] == server.process.pid
    server.stop()
    assert not path.exists()


def test_a_post_that_creates_is_not_repeated_after_it_was_sent(tmp_path):
    """The first connection answers once and then breaks in the middle of a POST."""
    requests = []
    sock = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = sock.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 2\r\n\r\n{}")
        for _ in range(2):
            requests.append(connection.recv(65536)[:4])
            connection.close()
            connection, _ = sock.accept()

    threading.Thread(target=serve, daemon=True).start()
    client = torc.Client(f"http://127.0.0.1:{sock.getsockname()[1]}")
    client.get("/ping")
    with pytest.raises(torc.Unreachable):
        client.post("/workflows", {"name": "n", "user": "u"})
    assert requests == [b"POST"]
    sock.close()


def test_connect_takes_the_first_of_option_variable_and_local_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    monkeypatch.setattr(torc, "listeners", lambda port: [])
    client = torc.connect(tell=said.append)
    assert client.is_local and said == ["using the local database torc_output/torc.db"]
    client.close()
    monkeypatch.setenv("TORC_DATABASE", str(tmp_path / "env.db"))
    assert torc.connect(tell=said.append).path == str(tmp_path / "env.db")
    assert torc.connect(url="http://h:1").where == f"http://h:1{torc.API_PREFIX}"
    monkeypatch.setenv("TORC_API_URL", "http://e:2/torc-service/v1")
    assert torc.connect(tell=said.append).path == str(tmp_path / "env.db")
    with pytest.raises(torc.UsageError, match="mutually exclusive"):
        torc.connect(database="x.db", url="http://h:1")
    monkeypatch.delenv("TORC_DATABASE")
    assert torc.connect(tell=said.append).where == "http://e:2/torc-service/v1"
    with pytest.raises(torc.Unreachable, match="there is no database missing.db yet"):
        torc.connect(database="missing.db", create=False)


def test_the_default_server_is_found_on_the_one_address_it_listens_on(tmp_path, monkeypatch):
    server = Server(tmp_path / "x.db", 0, "--host", "127.1.2.3")
    monkeypatch.setattr(torc, "DEFAULT_PORT", server.port)
    monkeypatch.setattr(torc, "is_loopback", lambda host: host == "127.0.0.1")
    assert torc.connect().where == f"http://127.1.2.3:{server.port}{torc.API_PREFIX}"


def test_another_users_server_at_the_default_url_is_neither_used_nor_passed_over(server, monkeypatch):
    monkeypatch.setattr(torc, "DEFAULT_PORT", server.port)
    monkeypatch.setattr(torc, "listeners", lambda port: [("127.0.0.1", os.getuid() + 1)])
    url = server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(torc.Unreachable, match=f"another user .* use --url {url}"):
        torc.connect()
    monkeypatch.setattr(torc, "listeners", lambda port: [("0.0.0.0", os.getuid())])
    assert torc.connect().where == url


def test_the_uid_column_tells_who_listens():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        assert torc.listeners(sock.getsockname()[1]) == [("127.0.0.1", os.getuid())]
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as sock:
        assert torc.listeners(sock.getsockname()[1]) == [("::1", os.getuid())]
    assert torc.listeners(free_port()) == []


# ==================================================================================================
# 11 Runner
# ==================================================================================================


class Ran(NamedTuple):
    """A finished `torc run`."""

    code: int
    log: str
    client: object
    directory: Path

    def results(self, **query):
        """Results by job name, in order of attempts."""
        names = {job["id"]: job["name"] for job in self.client.items("/jobs", workflow_id=1)}
        found = {}
        for item in self.client.items("/results", workflow_id=1, all_runs=True,
                                      include_stderr=True, **query):
            found.setdefault(names[item["job_id"]], []).append(item)
        return found

    def output(self, job_id, ending="o", attempt=1):
        """Text of a job's output file."""
        name = stdio_name(1, job_id, 1, attempt, ending)
        return (self.directory / "torc_output" / name).read_text()


def stdio_name(workflow_id, job_id, run_id, attempt_id, ending):
    """Path of a job's output file below the output directory."""
    return f"job_stdio/job_wf{workflow_id}_j{job_id}_r{run_id}_a{attempt_id}.{ending}"


def write_spec(directory, jobs, **top):
    """A spec file of jobs given as {"name": command or fields}."""
    path = directory / "spec.json"
    path.write_text(json.dumps({"name": "w", **top, "jobs": [
        {"name": name, **({"command": job} if isinstance(job, str) else job)}
        for name, job in jobs.items()]}))
    return path


def commands_action(trigger, *commands, **fields):
    """An action of a spec that runs commands."""
    return {"trigger_type": trigger, "action_type": "run_commands", "commands": list(commands),
            **fields}


def run_spec(directory, jobs, begun=None, url=None, parallel=None, env=None, **top):
    """`torc run` of write_spec() as a process, on x.db or a server; waits for the file `begun`."""
    words = ["--url", url] if url else ["--database", directory / "x.db"]
    words += ["--max-parallel-jobs", parallel] if parallel else []
    runner = start_run(directory, write_spec(directory, jobs, **top), *words, env=env)
    if begun:
        until((directory / begun).exists)
    return runner


@pytest.fixture
def run(tmp_path):
    """run({"name": command or fields}, *options, **top level of the spec) -> Ran."""
    clients = []

    def run(jobs, *options, env=None, spec={}, **top):
        database = str(tmp_path / "x.db")
        runner = start_run(tmp_path, write_spec(tmp_path, jobs, **spec, **top), "--database", database,
                           *options, env=env)
        code = runner.wait(100)
        clients.append(torc.LocalClient(database))
        return Ran(code, (tmp_path / "run.log").read_text(), clients[-1], tmp_path)

    yield run
    for client in clients:
        check_store(client.store)
        client.close()


@pytest.mark.parametrize("jobs, code, text", [
    ({"a": "true"}, 0, "completed after"),
    ({}, 0, "completed after"),
    ({"a": "exit 3", "b": {"command": "true", "depends_on": ["a"]}}, 1,
     'job 1 "a" failed: return code 3 (torc logs 1)'),
    ({"a": "kill -9 $$"}, 1, "return code 137"),
    ({"a": "no-such-command-here"}, 1, "return code 127"),
])
def test_run_does_not_exit_0_when_a_job_failed(run, jobs, code, text):
    ran = run(jobs)
    assert (ran.code, text in ran.log) == (code, True), ran.log


def test_run_does_not_wait_for_what_can_never_run_here(run):
    ran = run({"big": {"command": "true", "resource_requirements": "huge"}, "small": "true"},
              resource_requirements=[{"name": "huge", "num_cpus": 4096, "memory": "1m"}])
    assert ran.code == 3
    assert re.search(r'stopping with 1 job unfinished: 1 ready job \(such as "big"\) needs 4096 '
                     r"CPUs \(this runner has \d+\)", ran.log)
    assert statuses(ran.client, 1) == {"big": "ready", "small": "completed"}


def test_run_does_not_hang_on_a_disabled_job_and_names_it(tmp_path):
    client = torc.LocalClient(str(tmp_path / "x.db"))
    _, ids = make(client, {"off": [], "child": ["off"]}, start=False)
    client.put(f"/jobs/{ids['off']}", {"status": "disabled"})
    client.post("/workflows/1/initialize_jobs")
    runner = start_run(tmp_path, 1, "--database", tmp_path / "x.db")
    assert runner.wait(60) == 3
    assert '"off" (job 1) is disabled and holds up 1 job' in (tmp_path / "run.log").read_text()
    client.close()


def test_a_job_does_not_read_the_runners_stdin(run):
    assert run({"a": "cat; readlink /proc/self/fd/0"}).output(1) == "/dev/null\n"


@pytest.mark.parametrize("mode, files", [
    ("separate", {"o": "out\n", "e": "err\n"}), ("combined", {"log": "out\nerr\n"}),
    ("no_stdout", {"e": "err\n"}), ("no_stderr", {"o": "out\n"}), ("none", {})])
def test_output_goes_where_the_mode_says(run, mode, files):
    ran = run({"a": "echo out; echo err >&2"}, execution_config={"stdio": {"mode": mode}})
    names = os.listdir(tmp := ran.directory / "torc_output" / "job_stdio")
    assert {name.rpartition(".")[2]: (tmp / name).read_text() for name in names} == files


def test_output_of_a_successful_job_is_deleted_on_request(run):
    ran = run({"good": {"command": "echo x", "stdio": {"delete_on_success": True}},
               "bad": {"command": "echo x; false", "stdio": {"delete_on_success": True}}})
    names = os.listdir(ran.directory / "torc_output" / "job_stdio")
    assert sorted(names) == ["job_wf1_j2_r1_a1.e", "job_wf1_j2_r1_a1.o"]


def test_a_missing_output_file_fails_the_job_and_is_named(run):
    ran = run({"a": {"command": "touch there", "output_files": ["there", "gone"]}},
              files=[{"name": "there", "path": "there"}, {"name": "gone", "path": "sub/gone"}])
    [result] = ran.results()["a"]
    assert ran.code == 1 and (result["status"], result["return_code"]) == ("failed", 1)
    assert result["stderr_tail"] == f"torc: output file missing: {ran.directory}/sub/gone\n" == ran.output(1, "e")
    answer = ran.client.get("/jobs/1/why")
    assert answer["sentence"].endswith("/sub/gone") and answer["next"].startswith(
        "The command succeeded without writing that file there")


def test_modification_times_of_outputs_are_kept(run):
    ran = run({"a": {"command": "touch there", "output_files": ["f"]}},
              files=[{"name": "f", "path": "there"}])
    assert ran.client.get("/files/1")["st_mtime"] == os.stat(ran.directory / "there").st_mtime


def test_the_last_4_kb_of_stderr_travel_with_a_failure(run):
    ran = run({"a": "seq 10000 >&2; exit 1", "b": "echo fine >&2"})
    [bad], [good] = ran.results()["a"], ran.results()["b"]
    assert len(bad["stderr_tail"]) == 4096 and bad["stderr_tail"].endswith("9999\n10000\n")
    assert "stderr_tail" not in good


def test_a_job_knows_who_it_is(run):
    names = ("WORKFLOW_ID JOB_ID JOB_NAME RUN_ID ATTEMPT_ID OUTPUT_DIR DATABASE").split()
    ran = run({"a job": "; ".join(f"echo $TORC_{name}" for name in names)})
    assert ran.output(1).splitlines() == [
        "1", "1", "a job", "1", "1", str(ran.directory / "torc_output"), str(ran.directory / "x.db")]


def test_an_invocation_script_stands_before_the_command(run):
    ran = run({"a": {"command": "echo hello", "invocation_script": "env GREETING=x"}})
    assert ran.output(1) == "hello\n"


def test_a_job_gets_the_environment_of_its_workflow_and_its_own_wins(run):
    ran = run({"j_{i}": {"parameters": {"i": "1:2"}, "env": {"B": "{i}", "C": "it's \"$C\" é"},
                         "invocation_script": "test $A = w &&", "command": "echo \"$B/$C/$N\""},
               "k": "echo $B$C"}, env={"A": "shell's", "C": "C"}, spec={"env": {"A": "w", "B": "w", "N": 8}})
    assert [ran.output(job) for job in (1, 2, 3)] == [
        "1/it's \"$C\" é/8\n", "2/it's \"$C\" é/8\n", "wC\n"]
    assert ran.client.get("/workflows/1")["env"] == {"A": "w", "B": "w", "N": "8"}


def test_what_ran_in_another_environment_is_out_of_date(client):
    workflow_id, ids = make(client, {"a": [], "b": [], "c": ["b"]}, a={"env": {"A": "1"}})
    run_all(client, workflow_id, Conversation(client, workflow_id))
    client.put(f"/jobs/{ids['a']}", {"env": {"A": "1"}, "priority": 3})
    assert changed(client, workflow_id) == {}
    client.put(f"/jobs/{ids['a']}", {"env": {"A": "2"}})
    assert changed(client, workflow_id) == {"a": "its environment changed"}
    client.put(f"/workflows/{workflow_id}", {"env": {"W": "w"}})
    assert set(changed(client, workflow_id)) == {"a", "b", "c"}
    client.post(f"/jobs/{ids['a']}/rerun")
    [job] = Conversation(client, workflow_id).step(limit=9)["jobs"]
    assert json.loads(job["environment"]) == {"A": "2", "W": "w"}
    client.put(f"/jobs/{ids['a']}", {"env": {}})
    assert client.get(f"/jobs/{ids['a']}")["env"] == {}


def test_a_very_long_command_runs_from_a_file(run):
    ran = run({"a": "true '" + "x" * 200_000 + "'; echo $0 | wc -l"})
    assert ran.code == 0 and ran.output(1) == "1\n"


def test_broken_pipes_end_a_job_as_in_a_shell(run):
    ran = run({"a": "yes | head -1; echo ${PIPESTATUS[0]}"})
    assert ran.output(1) == "y\n141\n" and ran.output(1, "e") == ""


HANDLER = [{"name": "h", "rules": [{"exit_codes": [7], "recovery_script": "echo $TORC_RETURN_CODE "
            "$TORC_ATTEMPT_ID >> recovered", "max_retries": 3},
           {"match_all_exit_codes": True, "max_retries": 2}]}]


def test_a_failure_handler_runs_its_script_before_the_next_attempt(run):
    ran = run({"a": {"command": "test $TORC_ATTEMPT_ID = 3 && cat recovered || exit 7",
                     "failure_handler": "h"}}, failure_handlers=HANDLER)
    assert ran.code == 0, ran.log
    assert ran.output(1, attempt=3) == "7 1\n7 2\n"
    assert [(item["attempt_id"], item["return_code"]) for item in ran.results()["a"]] == [
        (1, 7), (2, 7), (3, 0)]


def test_max_retries_counts_attempts_and_other_codes_take_the_catch_all(run):
    ran = run({"a": {"command": "exit 7", "failure_handler": "h"},
               "b": {"command": "exit 9", "failure_handler": "h"}}, failure_handlers=HANDLER)
    assert ran.code == 1
    assert {name: len(items) for name, items in ran.results().items()} == {"a": 3, "b": 2}
    ran.client.post("/jobs/1/retry/1", max_retries=9)    # a person's, not the handler's
    assert "handler" not in ran.client.get("/jobs/1/why")["sentence"]


def test_a_failing_recovery_script_ends_the_retries(run):
    rules = [{"name": "h", "rules": [{"exit_codes": [7], "recovery_script": "exit 5"}]}]
    ran = run({"a": {"command": "exit 7", "failure_handler": "h"}}, failure_handlers=rules)
    [result] = ran.results()["a"]
    assert "the recovery script failed: return code 5" in result["stderr_tail"]


def test_an_attempt_that_is_tried_again_says_by_which_handler_and_leaves_an_event(run):
    ran = run({"a": {"command": "test $TORC_ATTEMPT_ID = 2 || exit 7; torc() { %s \"$@\"; }; torc -f json why 1"
                                % " ".join(map(str, COMMAND)), "failure_handler": "h"}}, failure_handlers=HANDLER)
    assert ran.code == 0, ran.log
    assert 'failed: return code 7; failure handler "h" tries it again: attempt 2 of 3' in ran.log
    assert json.loads(ran.output(1, attempt=2))["sentence"].endswith(
        '; failure handler "h" tries it again after attempt 1 failed with return code 7')
    [event] = [one["data"] for one in ran.client.items("/events", workflow_id=1)
               if one["data"].get("event_type") == "job_retried"]
    assert event == {"event_type": "job_retried", "job_id": 1, "job_name": "a", "run_id": 1, "previous_attempt": 1,
                     "new_attempt": 2, "message": 'job a: failure handler "h" tries it again after attempt 1 failed '
                                                  'with return code 7'}


@pytest.mark.slow
def test_out_of_memory_and_of_time_recover_by_rules_alone(run):
    hog = f"exec {PYTHON} -c \"x = bytearray(150 * 2**20); import time; time.sleep(2)\""
    ran = run({"hog": {"command": hog, "resource_requirements": "r", "failure_handler": "h"},
               "slow": {"command": "sleep 1.5", "resource_requirements": "r", "failure_handler": "h", "timeout": "PT1S"},
               "other": {"command": "true", "resource_requirements": "r"},
               "after": {"command": "true", "depends_on": ["hog", "slow"]}},
              resource_requirements=[{"name": "r", "num_cpus": 1, "memory": "60m"}],
              failure_handlers=[{"name": "h", "rules": [{
                  "on": ["oom", "timeout"], "max_attempts": 2, "memory_multiplier": 4, "runtime_multiplier": 2}]}])
    assert ran.code == 0, ran.log
    first, second = ran.results()["hog"]
    assert (first["return_code"], first["asked_memory"]) == (137, 60 * 2**20) and second["asked_memory"] >= 4 * 60 * 2**20
    assert (second["status"], second["asked_runtime"]) == ("completed", 3600)
    assert [row["return_code"] for row in ran.results()["slow"]] == [152, 0]
    assert ran.client.get("/jobs/2")["timeout"] == "PT1M" and ran.output(2, "e") == (
        "torc: ended after its time-out of 1.0s\n")
    needs = {row["id"]: row for row in ran.client.items("/resource_requirements", workflow_id=1)}
    used = [needs[ran.client.get(f"/jobs/{number}")["resource_requirements_id"]] for number in (1, 2, 3)]
    assert [used[1]["name"], used[2]["memory"]] == ["r", "60m"] and used[0]["name"] == f"r_recovered_{used[0]['memory']}"
    assert 'failure handler "h" tries it again: attempt 2 of 2 with more memory' in ran.log


def test_a_delayed_attempt_is_waited_for_and_told(run):
    ran = run({"a": {"command": "test $TORC_ATTEMPT_ID = 2", "failure_handler": "h"}, "b": {
        "command": "until torc -f json why 1 | tee seen | grep delayed; do sleep 0.1; done".replace(
            "torc", " ".join(map(str, COMMAND)))}},
        "-j", 2, failure_handlers=[{"name": "h", "rules": [{"on": ["exit_code"], "delay_s": 3}]}],
        compute_node_wait_for_new_jobs_seconds=0)
    assert ran.code == 0, ran.log
    first, second = ran.results()["a"]
    waited = torc.parse_time(second["completion_time"]) - torc.parse_time(first["completion_time"])
    assert 3000 <= waited < 3750 + 2000
    assert "its next attempt is delayed until 20" in (ran.directory / "seen").read_text()


def test_pending_failed_is_for_failures_without_a_rule(run):
    ran = run({"a": "exit 4", "b": {"command": "true", "depends_on": ["a"]}},
              use_pending_failed=True)
    assert ran.code == 3 and statuses(ran.client, 1) == {"a": "pending_failed", "b": "blocked"}
    assert '"a" (job 1) is pending_failed and holds up 1 job\n' in ran.log
    assert re.search("makes their failure final:\n  .* jobs resolve 1 retry ", ran.log)


@pytest.mark.slow
def test_a_job_over_its_memory_is_killed_with_all_its_children(run):
    hog = (f"{PYTHON} -c \"x = bytearray(300 * 2**20); import time; time.sleep(60)\" & "
           "sleep 300 & wait")
    ran = run({"a": {"command": hog, "resource_requirements": "r"}},
              resource_requirements=[{"name": "r", "num_cpus": 1, "memory": "50m"}])
    [result] = ran.results()["a"]
    assert (ran.code, result["status"], result["return_code"]) == (1, "failed", 137)
    assert re.search(r'killed: used \d+\.\d MB, the limit is 50\.0 MB \(resource requirements "r"\)',
                     result["stderr_tail"])
    assert result["peak_memory_bytes"] > 50 * 2**20          # it may be seen while it grows
    until(lambda: not processes_in(ran.directory), what="the end of all processes")


@pytest.mark.slow
def test_a_job_is_terminated_at_its_time_out_with_its_children(run):
    ran = run({"late": {"command": "trap 'echo saved; exit 0' TERM; sleep 300 & wait", "timeout": "PT1S"},
               "deaf": {"command": "trap '' TERM; sleep 301 & sleep 302; sleep 303", "timeout": "PT1S"},
               "quick": {"command": "true", "timeout": "PT1H"}}, "-j", 3,
              execution_config={"sigterm_lead_seconds": 1, "timeout_exit_code": 99})
    assert ran.code == 1, ran.log
    assert {name: (items[0]["status"], items[0]["return_code"]) for name, items in ran.results().items()} == {
        "late": ("terminated", 99), "deaf": ("terminated", 99), "quick": ("completed", 0)}
    assert ran.output(1) == "saved\n" and ran.output(1, "e") == "torc: ended after its time-out of 1.0s\n"
    assert '"late" terminated: ended after its time-out of 1.0s' in ran.log
    answer = ran.client.get("/jobs/1/why")
    assert answer["sentence"].endswith("torc: ended after its time-out of 1.0s")
    assert "its time-out is 1.0s. Run torc jobs update 1 --timeout PT1M, then" in answer["next"]
    [group] = ran.client.get("/workflows/1/failures")["groups"]
    assert (group["count"], group["cause"], group["verdict"]) == (2, "exit 99, time limit", "runtime")
    until(lambda: not processes_in(ran.directory), what="the end of all processes")


@pytest.mark.slow
def test_limit_runtime_makes_the_runtime_of_each_job_its_time_out(run):
    ran = run({"a": {"command": "sleep 300", "resource_requirements": "r"},
               "own": {"command": "sleep 1.5", "resource_requirements": "r", "timeout": "PT1H"}, "free": "sleep 1.5"},
              "-j", 3, execution_config={"limit_runtime": True},
              resource_requirements=[{"name": "r", "num_cpus": 1, "memory": "1g", "runtime": "PT1S"}])
    assert {name: items[0]["return_code"] for name, items in ran.results().items()} == {"a": 152, "own": 0, "free": 0}


@pytest.mark.slow
def test_the_time_limit_ends_jobs_with_their_children_as_terminated(run):
    ran = run({"a": "sleep 300 & sleep 301", "quick": "true",
               "saves": "trap 'echo saved; exit 0' TERM; sleep 302 & wait"}, "--time-limit", "PT8S",
              "--max-parallel-jobs", 3)
    assert ran.code == 1, ran.log
    assert {name: (items[0]["status"], items[0]["return_code"])
            for name, items in ran.results().items()} == {
        "a": ("terminated", 152), "quick": ("completed", 0), "saves": ("completed", 0)}
    until(lambda: not processes_in(ran.directory), what="the end of all processes")


def test_nothing_starts_that_does_not_fit_into_the_time_left(run):
    ran = run({"long": {"command": "true", "resource_requirements": "hours"}, "short": "true"},
              "--time-limit", "PT10M",
              resource_requirements=[{"name": "hours", "num_cpus": 1, "memory": "1m",
                                      "runtime": "PT2H"}])
    assert ran.code == 3 and statuses(ran.client, 1) == {"long": "ready", "short": "completed"}
    assert "PT2H" in ran.log and "left" in ran.log


def test_gpus_are_given_out_one_by_one(run):
    job = {"command": "echo $CUDA_VISIBLE_DEVICES; sleep 0.3", "resource_requirements": "gpu"}
    ran = run({"a": job, "b": job, "none": "echo none$CUDA_VISIBLE_DEVICES"}, "--num-gpus", 2,
              "--num-cpus", 4, env={"CUDA_VISIBLE_DEVICES": "5,7"},
              resource_requirements=[{"name": "gpu", "num_cpus": 1, "num_gpus": 1, "memory": "1g"}])
    assert sorted([ran.output(1), ran.output(2)]) == ["5\n", "7\n"]


@pytest.mark.slow
def test_mixed_sizes_never_use_more_than_there_is(run):
    jobs = {f"j{number}": {"command": "echo $TORC_JOB_NAME + >> load; sleep 0.05; "
                                      "echo $TORC_JOB_NAME - >> load",
                           "resource_requirements": ("one", "two", "three")[number % 3]}
            for number in range(60)}
    ran = run(jobs, "--num-cpus", 4, resource_requirements=[
        {"name": name, "num_cpus": cpus, "memory": "1g"}
        for name, cpus in (("one", 1), ("two", 2), ("three", 3))])
    assert ran.code == 0
    load = most = 0
    for line in (ran.directory / "load").read_text().splitlines():
        name, sign = line.split()
        load += (int(name[1:]) % 3 + 1) * (1 if sign == "+" else -1)
        most = max(most, load)
    assert 3 <= most <= 4


@pytest.mark.slow
@pytest.mark.slow
def test_a_limit_is_never_exceeded_by_four_runners(server, tmp_path):
    """500 jobs, a fifth of which fails once; each writes when it began and ended."""
    def now(what):
        return f'echo {what} "$(date +%s%N)" >> spans/$TORC_JOB_ID; '
    payload = {"workflow": {"name": "w", "user": "tester", "limits": {"io": 2}},
               "failure_handlers": [{"name": "h", "rules": json.dumps([{"exit_codes": [7], "max_retries": 3}])}],
               "jobs": [{"name": f"j{number}", "limits": {"io": 1} if number % 2 else {}, "failure_handler_id": 1,
                         "command": now(1) + "sleep 0.005; " + now(-1)
                         + f"test $TORC_ATTEMPT_ID != 1 -o {number % 5} != 0 || exit 7"} for number in range(500)]}
    (tmp_path / "spans").mkdir()
    client = server.client()
    workflow_id = client.post("/workflow_specs", payload)["id"]
    ids = {job["id"] for job in client.items("/jobs", workflow_id=workflow_id) if job.get("limits")}
    client.post(f"/workflows/{workflow_id}/initialize_jobs")
    runners = [start_run(tmp_path, workflow_id, "--url", server.url, "-j", "3", "-o", f"out{number}")
               for number in range(4)]
    assert [runner.wait(120) for runner in runners] == [0, 0, 0, 0], (tmp_path / "run.log").read_text()
    assert set(statuses(client, workflow_id).values()) == {"completed"}
    steps = sorted((int(when), int(step)) for job_id in ids
                   for line in (tmp_path / "spans" / str(job_id)).read_text().splitlines()
                   for step, when in [line.split()])
    levels = list(itertools.accumulate(step for _, step in steps))
    assert (max(levels), levels[-1], len(steps)) == (2, 0, 2 * 300)


def test_two_runners_share_long_jobs_evenly(server, tmp_path):
    client = server.client()
    bench_workflow(client, [{"name": f"j{number}", "command": "sleep 0.6"} for number in range(20)])
    runners = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        runners.append(start_run(tmp_path / name, 1, "--url", server.url, "--max-parallel-jobs", 2))
    assert [runner.wait(60) for runner in runners] == [0, 0]
    by_node = {}
    for item in client.items("/results", workflow_id=1):
        by_node[item["compute_node_id"]] = by_node.get(item["compute_node_id"], 0) + 1
    assert sorted(by_node.values()) in ([8, 12], [9, 11], [10, 10]), by_node


@pytest.mark.slow
def test_monitoring_is_not_off_without_enabled_and_no_job_reports_0_mb(run):
    ran = run({"short": f"{PYTHON} -c 'for i in range(10**6): pass'",
               "long": f"{PYTHON} -c 'import time; x = bytearray(80 * 2**20); time.sleep(2.5)'"},
              resource_monitor={"granularity": "summary"})
    [short], [long] = ran.results()["short"], ran.results()["long"]
    assert short["avg_cpu_percent"] > 20
    assert long["peak_memory_bytes"] > 80 * 2**20 and long["avg_memory_bytes"] > 0
    assert short.get("peak_memory_bytes", 1) > 0


def test_monitoring_can_be_turned_off(run):
    [result] = run({"a": "true"}, resource_monitor={"enabled": False}).results()["a"]
    assert not [name for name in result if re.search("(avg|peak)_", name)]


@pytest.mark.slow
def test_a_time_series_is_written_where_plots_look_for_it(run):
    ran = run({"a": "sleep 3.2"}, resource_monitor={"granularity": "time_series",
                                                    "sample_interval_seconds": 1})
    [path] = (ran.directory / "torc_output" / "resource_utilization").iterdir()
    assert re.fullmatch(r"resource_metrics_wf1_h.*_r1\.db", path.name)
    with contextlib.closing(sqlite3.connect(path)) as series:
        rows = series.execute("SELECT job_id, memory_bytes, num_processes FROM"
                              " job_resource_samples").fetchall()
        assert len(rows) >= 2 and all(row[0] == 1 and row[1] > 0 and row[2] >= 1 for row in rows)
        assert series.execute("SELECT * FROM job_metadata").fetchall() == [(1, "a")]


def test_actions_run_at_their_moments(run):
    def action(trigger, *commands, **more):
        return commands_action(trigger, f"echo {trigger} >> order", *commands, **more)

    ran = run({"a": "sleep 0.2; echo a >> torc_output/order",
               "b": {"command": "echo b >> torc_output/order", "depends_on": ["a"]}},
              actions=[action("on_workflow_start"), action("on_worker_start"),
                       action("on_jobs_complete", jobs=["b"]), action("on_workflow_complete"),
                       action("on_worker_complete", "exit 9", "echo never >> order")])
    order = (ran.directory / "torc_output" / "order").read_text().split()
    assert ran.code == 0, ran.log
    assert order[:4] == ["on_workflow_start", "on_worker_start", "a", "b"]
    assert sorted(order[4:]) == ["on_jobs_complete", "on_worker_complete", "on_workflow_complete"]
    assert "`exit 9` failed: return code 9" in ran.log


def test_a_signal_ends_an_action_at_work_and_no_job_is_begun(tmp_path):
    runner = run_spec(tmp_path, {"a": "true"}, begun="begun", actions=[
        commands_action("on_workflow_start", "touch ../begun; sleep 300", "touch ../never")])
    runner.terminate()
    assert runner.wait(60) == 143
    until(lambda: not processes_in(tmp_path), what="the end of all processes")
    with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"))) as client:
        assert statuses(client, 1) == {"a": "ready"}
        assert client.page("/compute_nodes", workflow_id=1, is_active=True)["items"] == []
    assert not (tmp_path / "never").exists()


def test_a_signal_ends_a_recovery_script_and_the_job_is_tried_again_by_the_next_runner(tmp_path):
    runner = run_spec(
        tmp_path, {"a": {"command": "test -e mended", "failure_handler": "h"}}, begun="begun",
        failure_handlers=[{"name": "h", "rules": [
            {"exit_codes": [1], "recovery_script": "touch begun; sleep 300"}]}])
    runner.terminate()
    assert runner.wait(60) == 143
    (tmp_path / "mended").touch()
    assert start_run(tmp_path, 1, "--database", tmp_path / "x.db").wait(60) == 0


@pytest.mark.slow
def test_an_action_that_ignores_the_signal_does_not_hold_the_runner(tmp_path):
    runner = run_spec(tmp_path, {"a": "true"}, begun="begun", actions=[
        commands_action("on_workflow_start", "trap '' TERM; touch ../begun; sleep 300")])
    runner.terminate()
    assert runner.wait(60) == 143
    until(lambda: not processes_in(tmp_path), what="the end of all processes")


def test_an_action_outlasts_the_last_job(run):
    ran = run({"a": "true"}, actions=[commands_action(
        "on_jobs_complete", "sleep 0.5", "touch ../second", "sleep 0.2; touch ../third",
        jobs=["a"])])
    assert ran.code == 0, ran.log
    assert (ran.directory / "third").exists()


@pytest.mark.slow
def test_a_slot_is_free_while_a_recovery_script_runs(tmp_path):
    runner = run_spec(
        tmp_path, {"a": {"command": "sleep 0.7; test -e go", "failure_handler": "h", "priority": 1},
                   "b": "touch go"},
        failure_handlers=[{"name": "h", "rules": [
            {"exit_codes": [1], "recovery_script": "while ! test -e go; do sleep 0.05; done"}]}],
                      parallel=1)
    until((tmp_path / "go").exists, 15)   # the next heartbeat would be after 30 s
    assert runner.wait(60) == 0


def test_nohup_is_honoured(tmp_path):
    spec = write_spec(tmp_path, {"a": "touch begun; while ! test -e go; do sleep 0.05; done"})
    runner = subprocess.Popen(["nohup", PYTHON, TORC, "run", str(spec), "--database", "x.db"],
                              cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    until((tmp_path / "begun").exists)
    runner.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    assert runner.wait(60) == 0


def test_a_job_that_has_ended_is_not_taken_for_interrupted(tmp_path):
    runner = run_spec(tmp_path, {"a": "touch begun; while ! test -e go; do sleep 0.01; done",
                                 "b": {"command": "true", "depends_on": ["a"]}}, begun="begun")
    os.kill(runner.pid, signal.SIGSTOP)
    (tmp_path / "go").touch()
    until(lambda: "bash" in zombies_of(runner.pid), what="the end of the job")
    runner.terminate()
    os.kill(runner.pid, signal.SIGCONT)
    assert runner.wait(60) == 143
    with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"))) as client:
        assert statuses(client, 1) == {"a": "completed", "b": "ready"}


def zombies_of(pid):
    """Names of the dead children of a process that nobody has waited for."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name, _, rest = Path(f"/proc/{child}/stat").read_text().partition(" (")[2].rpartition(")")
            if rest.split()[0] == "Z":
                found.append(name)
    return found


def test_dead_orphans_of_jobs_are_buried(tmp_path):
    runner = run_spec(tmp_path, {
        "a": "(sleep 0.2; touch dead) &", "b": "sleep 1.3",
        "c": {"command": "while ! test -e go; do sleep 0.05; done", "depends_on": ["b"]}},
                      begun="dead")
    until(lambda: not zombies_of(runner.pid), what="the end of the zombie")
    (tmp_path / "go").touch()
    assert runner.wait(60) == 0


def test_an_output_directory_that_cannot_be_written_is_said_at_once(tmp_path):
    somebody = []
    if os.geteuid() == 0:                 # for whom nothing is unwritable
        somebody = ["setpriv", "--reuid=65534", "--clear-groups"]
        for directory in (tmp_path, *tmp_path.parents):
            if directory.stat().st_mode & 0o005 != 0o005:
                directory.chmod(0o755)
    shutil.copy(TORC, tmp_path / "torc.py")
    write_spec(tmp_path, {"a": "true"})
    (tmp_path / "torc_output" / "job_stdio").mkdir(parents=True)
    (tmp_path / "torc_output").chmod(0o777), (tmp_path / "torc_output" / "job_stdio").chmod(0o555)
    done = subprocess.run([*somebody, "/usr/bin/python3", "torc.py", "run", "spec.json"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "job_stdio cannot be written by you" in done.stderr


def test_run_with_json_tells_at_the_end_how_it_went(tmp_path):
    spec = write_spec(tmp_path, {"a": "exit 4"})
    done = subprocess.run([*COMMAND, "-f", "json", "run", str(spec), "--database", "x.db"],
                          cwd=tmp_path, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_code"] == 1
    assert report["jobs_by_status"]["failed"] == 1 and report["is_complete"]
    done = subprocess.run([*COMMAND, "run", "1", "--database", "x.db"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert re.search("all jobs of workflow 1 have already ended; to rerun the failed jobs:\n"
                     "  .* run 1 --failed --database x.db\n", done.stderr)


def test_what_has_ended_and_not_changed_is_told_what_runs_it_again(cli, local):
    make(local, {"a": [], "b": []})
    node = make_node(local, 1)
    for job_id in (1, 2):
        complete(local, job_id, 1, node)
    local.put(f"/compute_nodes/{node}", {"is_active": False})
    for words in (("run", 1), ("workflows", "reinit", 1)):
        assert cli(*words, "--dry-run", ok=0)[1].endswith(
            "to run everything again:\n  torc workflows init 1\n")
    _, ids = make(local, {"a": [], "b": ["a"]})
    complete(local, ids["a"], 2, node := make_node(local, 2), 3)
    local.put(f"/compute_nodes/{node}", {"is_active": False})
    for words in (("run", 2), ("workflows", "reinit", 2)):
        assert cli(*words, "--dry-run", ok=0)[1].endswith(
            "to rerun the failed jobs:\n  torc run 2 --failed\n")


def test_somebody_elses_workflow_is_run_only_if_that_is_said(tmp_path):
    with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"), "mallory")) as client:
        make(client, {"a": []})
        words = ["1", "--database", tmp_path / "x.db"]
        assert start_run(tmp_path, *words).wait(60) == 2
        assert ("Workflow 1 belongs to mallory; its commands would run as you, tester. Run them? "
                "There is no terminal to ask on: use --allow-owner mallory"
                ) in (tmp_path / "run.log").read_text()
        assert statuses(client, 1) == {"a": "ready"}
        assert start_run(tmp_path, *words, "--allow-owner", "mallory").wait(60) == 0


@pytest.mark.slow
def test_a_runner_that_was_killed_is_not_taken_for_alive(tmp_path):
    runner = run_spec(tmp_path, {"a": "touch begun; sleep 300"}, begun="begun")

    def ask(*words):
        return subprocess.run([*COMMAND, *words, "--database", "x.db"], cwd=tmp_path,
                              capture_output=True, text=True).stdout

    until(lambda: "is running: it is running on" in ask("why", "1"))
    runner.kill(), runner.wait()
    assert f"the runner with pid {runner.pid} on {socket.gethostname()} is gone; to run the job again:\n  torc run 1" in ask(
        "why", "1")
    assert f"Active runners: 0 (and 1 that died: pid {runner.pid})" in ask("status", "1")
    assert "no runner is active" in ask("status", "1")


def test_a_deleted_workflow_ends_its_runner_without_wrong_advice(tmp_path):
    runner = run_spec(tmp_path, {"a": "touch begun; sleep 300"}, begun="begun")
    with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"))) as client:
        client.delete("/workflows/1")
    assert runner.wait(60) == 1
    log = (tmp_path / "run.log").read_text()
    assert "the workflow is gone" in log
    assert "to go on" not in log and "tried again" not in log
    assert not list((tmp_path / "torc_output" / "journal").iterdir())


def test_clones_begin_where_another_has_found_the_server(tmp_path):
    server = Server(tmp_path / "moved.db")
    root = server.client()
    make(root.clone(), {"a": []})         # the root itself has asked nothing
    server.kill()
    moved = Server(tmp_path / "moved.db")
    assert moved.port != server.port
    assert root.clone().get("/ping") and root.where == moved.url
    moved.kill()
    Server(tmp_path / "moved.db", server.port)
    connection, response = root.clone().open_stream("/workflows/1/events/stream", "")
    assert response.status == 200
    connection.close()


@pytest.mark.slow
def test_a_job_begun_after_the_server_has_moved_reaches_it(tmp_path):
    server = Server(tmp_path / "x.db")
    ask = f"{PYTHON} {TORC} user-data list 1"
    runner = run_spec(tmp_path, {
        "a": f"touch begun; while ! test -e go; do sleep 0.05; done; {ask}",
        "b": {"command": ask, "depends_on": ["a"]}}, url=server.url, begun="begun")
    server.kill()
    server = Server(tmp_path / "x.db")
    (tmp_path / "go").touch()
    assert runner.wait(60) == 0, (tmp_path / "run.log").read_text()


def test_what_a_job_that_uses_nothing_uses_is_not_made_up(run):
    ran = run({f"j{number}": "true" for number in range(30)})
    results = [result for found in ran.results().values() for result in found]
    assert {result.get("peak_memory_bytes", 0) // 2**20 for result in results} <= set(range(6))
    assert max(result["avg_cpu_percent"] for result in results) < 150


def test_a_limit_of_months_is_no_number_too_large(run):
    assert run({"a": "true"}, "--time-limit", "P300D").code == 0


def test_output_files_that_cannot_be_opened_leak_no_descriptor(tmp_path):
    paths = [str(tmp_path / "o"), str(tmp_path)]
    number = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(IsADirectoryError), torc.opened(paths):
            pass
    assert len(os.listdir("/proc/self/fd")) == number


def test_the_journal_loses_nothing_between_threads(tmp_path):
    journal = torc.Journal(str(tmp_path / "x.jsonl"), {"pid": 1})
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def write(thread):
        for number in range(3000):
            journal.add({"end": [thread, number]})
            if number % 3 == 0:
                journal.flush()

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    journal.close(remove=False)
    ends = [record["end"] for record in torc.read_journal(journal.path)[0] if "end" in record]
    assert sorted(ends) == [[thread, number] for thread in range(4) for number in range(3000)]


def test_a_job_that_cannot_be_a_process_fails_and_says_why(tmp_path):
    database = str(tmp_path / "x.db")
    with contextlib.closing(torc.LocalClient(database)) as client:
        workflow_id, ids = make(client, {"a": [], "b": []}, start=False)
        client.put(f"/jobs/{ids['a']}", {"command": "echo a\0b"})
        client.post(f"/workflows/{workflow_id}/initialize_jobs")
        assert start_run(tmp_path, workflow_id, "--database", database).wait(60) == 1
        [result] = client.page("/results", workflow_id=workflow_id, job_id=ids["a"])["items"]
        assert result["return_code"] == 126
        assert "could not be started: embedded null byte" in client.get(
            f"/jobs/{ids['a']}/why")["sentence"]
        assert statuses(client, workflow_id)["b"] == "completed"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk_is_the_fault_of_the_machine_and_fails_no_job(tmp_path):
    (tmp_path / "torc_output").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=12", "small",
                    tmp_path / "torc_output"], check=True)
    try:
        runner = run_spec(tmp_path, {f"j{number}": "true" for number in range(20)},
                          compute_node_wait_for_new_jobs_seconds=1)
        assert runner.wait(60) == 1
        log = (tmp_path / "run.log").read_text()
        assert "jobs cannot be started on this machine: No space left on device: " in log
        with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"))) as client:
            assert set(statuses(client, 1).values()) == {"completed", "ready"}
            [node] = client.page("/compute_nodes", workflow_id=1)["items"]
            assert node["death"]["text"].startswith("it could start no jobs: No space left on device")
    finally:
        subprocess.run(["umount", tmp_path / "torc_output"], check=True)
    assert start_run(tmp_path, 1, "--database", tmp_path / "x.db").wait(60) == 0


def test_a_runner_without_bash_leaves_nothing_behind(tmp_path):
    runner = run_spec(tmp_path, {"a": "true"}, env={"PATH": str(tmp_path)})
    assert runner.wait(60) == 1
    assert "there is no bash on the PATH" in (tmp_path / "run.log").read_text()
    with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"))) as client:
        assert client.page("/compute_nodes", workflow_id=1)["items"] == []


@pytest.mark.slow
def test_a_prefetched_job_given_back_is_not_taken_again(tmp_path):
    """Quick jobs, then long ones of the same kind: the rate of the quick ones is over."""
    jobs = {f"quick{number}": {"command": "true", "priority": 9} for number in range(40)}
    jobs.update({f"long{number}": "sleep 3" for number in range(4)})
    runner = run_spec(tmp_path, jobs, parallel=1)
    until((tmp_path / "x.db").exists)
    with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"))) as client:
        def long_ones():
            found = statuses(client, 1) if client.page("/workflows")["items"] else {}
            return sorted(found.get(f"long{number}", "") for number in range(4))

        until(lambda: long_ones()[3] == "running" and long_ones()[0] == "ready")
        until(lambda: long_ones() == ["ready", "ready", "ready", "running"])
        time.sleep(1.2)                   # two rounds of giving back
        assert long_ones() == ["ready", "ready", "ready", "running"]
    runner.terminate()
    assert runner.wait(60) == 143


def test_the_guardian_ends_the_jobs_of_a_killed_runner(tmp_path):
    runner = run_spec(tmp_path, {
        "a": "sleep 300 & setsid sleep 301 & (env -i sleep 302 &) ; touch started; sleep 303"},
                      begun="started")
    assert len(processes_in(tmp_path)) >= 5
    runner.kill(), runner.wait()
    until(lambda: not processes_in(tmp_path), what="the end of all processes")


@pytest.mark.slow
def test_results_of_a_killed_runner_are_handed_in_by_the_next(tmp_path):
    """The server dies, a job ends, the runner is killed: its journal knows what nobody else does."""
    server = Server(tmp_path / "x.db")
    runner = run_spec(tmp_path, {"a": "echo once >> runs; while test ! -e go; do sleep 0.05; done",
                                 "b": "sleep 300"}, url=server.url, parallel=2, begun="runs")
    until(lambda: list(statuses(server.client(), 1).values()) == ["running", "running"])
    server.kill()
    (tmp_path / "go").touch()
    [journal] = (tmp_path / "torc_output" / "journal").glob("*.jsonl")
    assert journal.stat().st_mode & 0o777 == 0o600
    until(lambda: '"end"' in journal.read_text())
    runner.kill(), runner.wait()
    server = Server(tmp_path / "x.db")
    client = server.client()
    client.put("/jobs/2", {"priority": 0})
    runner = start_run(tmp_path, 1, "--url", server.url, "--max-parallel-jobs", 2)
    until(lambda: statuses(client, 1) == {"a": "completed", "b": "running"}
          and client.get("/jobs/2")["attempt_id"] == 2)
    client.post("/jobs/2/stop", status="canceled")
    assert runner.wait(60) == 1
    assert (tmp_path / "runs").read_text() == "once\n"
    results = client.page("/results", workflow_id=1, all_runs=True)["items"]
    assert sorted((item["job_id"], item["attempt_id"], item["return_code"]) for item in results)[
        :2] == [(1, 1, 0), (2, 1, -128)]
    assert "1 result of the runner with pid" in (tmp_path / "run.log").read_text()
    assert not list((tmp_path / "torc_output" / "journal").glob("*.jsonl"))


def is_running(server):
    """Whether a job of workflow 1 is running."""
    with contextlib.suppress(torc.NotFound):
        return "running" in statuses(server.client(), 1).values()


@pytest.mark.slow
def test_a_server_that_stays_away_costs_no_job(tmp_path):
    """What runs goes on beyond the lease; its result waits in the journal."""
    server = Server(tmp_path / "x.db")
    runner = run_spec(tmp_path, {"a": "echo once >> runs; while test ! -e go; do sleep 0.05; done", "b": "true"},
                      compute_node_wait_for_healthy_database_minutes=0,
                      url=server.url, parallel=1, begun="runs")
    until(lambda: is_running(server))
    server.kill()
    until(lambda: "the jobs continue" in (tmp_path / "run.log").read_text())
    time.sleep(1)                         # the lease is shorter: nothing happens
    assert runner.poll() is None
    (tmp_path / "go").touch()
    assert runner.wait(60) == 1
    log = (tmp_path / "run.log").read_text()
    assert "as long as the workflow allows: the results wait in the journal" in log
    assert re.search("to go on:\n  .* run 1 --url ", log)
    server = Server(tmp_path / "x.db")
    assert start_run(tmp_path, 1, "--url", server.url).wait(60) == 0
    assert (tmp_path / "runs").read_text() == "once\n"
    assert [(row["job_id"], row["return_code"]) for row in server.client().page(
        "/results", workflow_id=1, all_runs=True)["items"]] == [(1, 0), (2, 0)]


@pytest.mark.slow
def test_canceling_the_workflow_ends_its_jobs(tmp_path):
    server = Server(tmp_path / "x.db")
    runner = run_spec(tmp_path, {"a": "sleep 300", "b": "sleep 301"}, url=server.url, parallel=1)
    until(lambda: is_running(server))
    server.client().put("/workflows/1/cancel")
    assert runner.wait(60) == 1, (tmp_path / "run.log").read_text()
    until(lambda: not processes_in(tmp_path), what="the end of all processes")
    assert statuses(server.client(), 1) == {"a": "canceled", "b": "ready"}
    assert server.client().page("/results", workflow_id=1)["total_count"] == 1


@contextlib.contextmanager
def gateway(server, fault):
    """A reverse proxy before a server; fault(path, number of requests before) is None, "lose" (the
    answer is lost) or a status that it answers itself. Yields its URL."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    numbers = iter(range(10**9))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            trouble = fault(self.path, next(numbers))
            if isinstance(trouble, int):
                self.send_response(trouble)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            upstream = http.client.HTTPConnection("127.0.0.1", server.port)
            upstream.request(self.command, self.path, body, dict(self.headers))
            response = upstream.getresponse()
            data = response.read()
            upstream.close()
            if trouble == "lose":
                self.close_connection = True
                return
            self.send_response(response.status)
            for name in ("Content-Type", "X-Torc-Server"):
                self.send_header(name, response.headers[name])
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = pass_on

        def log_message(self, *_):
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}{torc.API_PREFIX}"
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()


@pytest.mark.parametrize("trouble", ["lose", 500, 502, 503, 504])
def test_a_fault_between_runner_and_server_ends_no_job(server, tmp_path, trouble):
    """Every third step gets no answer, or that of a gateway in trouble."""
    spec = traced_spec(tmp_path, 12)
    client = server.client()
    steps = iter(range(10**9))
    with gateway(server, lambda path, _: trouble if path.endswith("/runner_step")
                 and next(steps) % 3 == 1 else None) as url:
        runner = start_run(tmp_path, spec, "--url", url, "--max-parallel-jobs", 4)
        assert runner.wait(100) == 0, (tmp_path / "run.log").read_text()
    check_traces(tmp_path, client, 1)
    assert client.page("/results", workflow_id=1, all_runs=True)["total_count"] == 12


@pytest.mark.slow
def test_a_server_away_during_an_action_does_not_end_the_runner(tmp_path):
    server = Server(tmp_path / "x.db")
    runner = run_spec(tmp_path, {"a": "true"}, actions=[
        {"trigger_type": f"on_{what}", "action_type": "run_commands",
         "commands": [f"touch ../{what}; while ! test -e ../go_{what}; do sleep 0.05; done"]}
        for what in ("worker_start", "workflow_complete")], url=server.url)
    for what in ("worker_start", "workflow_complete"):
        until((tmp_path / what).exists)
        server.kill()
        (tmp_path / f"go_{what}").touch()
        until(lambda: (tmp_path / "run.log").read_text().count("the jobs continue"))
        server = Server(tmp_path / "x.db", port=server.port)
    assert runner.wait(60) == 0, (tmp_path / "run.log").read_text()
    assert (tmp_path / "run.log").read_text().count("the server is back") == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_runner_that_is_signaled_leaves_though_the_server_does_not_answer(tmp_path, how):
    server = Server(tmp_path / "x.db")
    runner = run_spec(tmp_path, {"a": "test -e go || sleep 300"}, url=server.url)
    until(lambda: is_running(server))
    server.process.send_signal(how)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(25) == 130         # ten seconds are for the server
    log = (tmp_path / "run.log").read_text()
    assert "the results wait in the journal" in log and re.search("to go on:\n  .* run 1 --url ", log)
    until(lambda: not processes_in(tmp_path) or how == signal.SIGSTOP)
    server.process.send_signal(signal.SIGCONT)
    server.kill()
    assert list((tmp_path / "torc_output" / "journal").glob("*.jsonl"))
    (tmp_path / "go").touch()
    assert start_run(tmp_path, 1, "--database", server.database).wait(60) == 0


def test_two_successors_of_a_dead_runner_do_not_disturb_each_other(tmp_path, api, monkeypatch):
    workflow_id, _ = make(api, {"a": []})
    sleeper = subprocess.Popen(["sleep", "60"])
    identity = {"hostname": socket.gethostname(), "boot_id": torc.boot_id(), "pid": sleeper.pid,
                "pid_started": torc.process_start(sleeper.pid)}
    sleeper.kill(), sleeper.wait()
    runner = Conversation(api, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    journal = torc.Journal(str(tmp_path / "x.jsonl"), {
        **identity, "workflow_id": workflow_id, "compute_node_id": runner.node, "token": "t"})
    journal.add({"end": runner.done(job)})
    journal.close(remove=False)
    monkeypatch.setattr(torc, "kill_leftovers", lambda *_: os.unlink(journal.path))
    [sentence] = torc.clean_up(api, journal.path)
    assert sentence.startswith("1 result of the runner")
    assert statuses(api, workflow_id) == {"a": "completed"}


def test_cpus_are_those_we_may_use_not_those_there_are(tmp_path):
    code = "import torc; print(torc.usable_cpus(), torc.usable_memory() > 2**26)"
    done = subprocess.run(["taskset", "-c", "0", PYTHON, "-c", code], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.stdout == "1 True\n"


def test_gpus_come_from_the_variable_that_hides_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8f")
    assert torc.usable_gpus() == ["2", "GPU-8f"]
    for none in ("", "-1", "NoDevFiles", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert torc.usable_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 1,-1,2")
    assert torc.usable_gpus() == ["0", "1"]


def test_a_group_that_was_not_noted_is_found_by_its_marked_member(tmp_path):
    """The runner died between making a process and noting it."""
    job = subprocess.Popen(["bash", "-c", "env -i sleep 300 & touch begun; wait"], cwd=tmp_path,
                           env={**os.environ, "TORC_RUNNER": "token"}, start_new_session=True)
    until((tmp_path / "begun").exists)
    until(lambda: len(processes_in(tmp_path)) == 2)
    reaper = threading.Thread(target=job.wait)
    reaper.start()
    torc.kill_leftovers("token", [])
    reaper.join()
    until(lambda: not processes_in(tmp_path), what="the end of all processes")


# ---- actions

@pytest.mark.parametrize("trigger", ["on_workflow_start", "on_workflow_complete"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_action_that_was_cut_short_is_carried_out_by_the_next_runner(tmp_path, trigger, how):
    """The action notes its beginning and its end, and waits for a file in between."""
    if trigger == "on_workflow_complete":
        (tmp_path / "ready").touch()
    runner = run_spec(tmp_path, {"a": "cat ready; touch ran"}, begun="acts", actions=[
        commands_action(
            trigger, "echo begun >> ../acts; while test ! -e ../go; do sleep 0.05; done",
            "echo done >> ../acts; touch ../ready")])
    runner.send_signal(how)
    assert runner.wait(60) == (143 if how == signal.SIGTERM else -9)
    until(lambda: not processes_in(tmp_path / "torc_output"), what="the end of the action's script")
    (tmp_path / "go").touch()
    assert start_run(tmp_path, 1, "--database", tmp_path / "x.db").wait(60) == 0
    assert (tmp_path / "acts").read_text().split() == ["begun", "begun", "done"]
    assert (tmp_path / "ran").exists()
    with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"))) as client:
        [action] = client.get("/workflows/1/actions")
        assert action["executed"] and client.get("/workflows/1/actions/pending", waiting=True) == []


def test_an_action_of_a_dead_runner_is_pending_again_one_of_torcs_is_not(client):
    workflow_id, _ = make(client, {"a": []})
    path = f"/workflows/{workflow_id}/actions"
    ids = [act(client, workflow_id, "on_worker_start", trigger_count=1) for _ in range(3)]
    runner, torcs = Conversation(client, workflow_id, boot_id="b"), make_node(client, workflow_id)
    for action_id, node in zip(ids, (runner.node, runner.node, torcs)):
        client.post(f"{path}/{action_id}/claim", {"compute_node_id": node})
    with pytest.raises(torc.Conflict, match="no longer claimed by this compute node"):
        client.put(f"{path}/{ids[1]}/claim", compute_node_id=torcs)
    client.put(f"{path}/{ids[1]}/claim", compute_node_id=runner.node)    # that one has been carried out
    for node in (runner.node, torcs):
        client.post(f"/compute_nodes/{node}/release")
    assert [action["id"] for action in client.get(f"{path}/pending")] == [ids[0]]


def test_allocations_of_an_action_that_failed_half_way_are_not_asked_for_twice(server, programs, tmp_path):
    client = server.client()
    workflow_id, _ = make(client, {"a": []}, start=False)
    scheduler = client.post("/slurm_schedulers", {"workflow_id": workflow_id, "name": "s", "account": "x",
                                                  "nodes": 1, "walltime": "01:00:00"})
    path = f"/workflows/{workflow_id}/actions"
    client.post(path, {"workflow_id": workflow_id, "trigger_type": "on_workflow_start", "trigger_count": 1,
                       "action_type": "schedule_nodes", "action_config": {
                           "scheduler_type": "slurm", "scheduler_id": scheduler["id"], "num_allocations": 3}})
    calls = tmp_path / "calls"
    programs(sbatch=f"echo x >> {calls}; n=$(/usr/bin/wc -l < {calls}); [ $n -lt 3 ] || [ -e {tmp_path}/room ] || "
                    "{ echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1; }; echo $((100 + n))",
             scontrol="echo 'ClusterName = here'")
    request = torc.WorkerRequest(str(tmp_path / "out"), str(tmp_path), ("http://127.0.0.1:1/torc-service/v1",))
    with pytest.raises(torc.TorcError, match="QOSMaxSubmitJobPerUserLimit") as caught:
        torc.schedule_pending(client, workflow_id, request)
    assert caught.value.submitted == [101, 102]
    for _ in range(4):                    # other runners look: it rests
        assert torc.schedule_pending(client, workflow_id, request) == []
    assert len(calls.read_text().split()) == 3
    (tmp_path / "room").touch()
    [(action, ids)] = torc.schedule_pending(client, workflow_id, request, waiting=True)
    assert (action["submitted"], ids) == (2, [104])
    assert client.page("/scheduled_compute_nodes", workflow_id=workflow_id)["total_count"] == 3
    assert client.get(f"{path}/pending", waiting=True) == []


def test_status_does_not_call_a_silent_runner_active(server, cli):
    client = server.client()
    workflow_id, _ = make(client, {"a": []})
    Conversation(client, workflow_id, hostname="c9").step()
    assert "Active runners: 1\n" in cli("--url", server.url, "status", workflow_id, ok=0)[1]
    with contextlib.closing(torc.Store(server.database)) as store:
        store.heard[1] = time.monotonic() - 100          # the server has not heard of it for so long
        report = torc.workflow_report(torc.LocalClient(store.path, "tester", store), workflow_id)
    assert (report["active_compute_nodes"], report["silent_runners"]) == (0, ["c9"])


def test_an_action_that_somebody_else_has_ends_no_runner(client):
    """torc submit and watch claim actions without a compute node."""
    workflow_id, _ = make(client, {"a": []})
    path = f"/workflows/{workflow_id}/actions"
    action = client.post(path, {"workflow_id": workflow_id, "trigger_type": "on_worker_start", "trigger_count": 1,
                                "action_type": "run_commands", "action_config": {"commands": ["true"]}})
    client.post(f"{path}/{action['id']}/claim", {})
    runner = torc.Runner(client, workflow_id)
    runner.node_id, runner.tokens = make_node(client, workflow_id), False
    runner._runnable, runner._run_commands = lambda *_: [action], pytest.fail    # as they were a moment ago
    runner.run_actions(client, ("on_worker_start",))
    action = client.post(path, action)
    assert [client.post(f"{path}/{action['id']}/claim", {"compute_node_id": runner.node_id})["success"]
            for _ in range(2)] == [True, True]           # the first answer may have been lost
    with pytest.raises(torc.Conflict):
        client.post(f"{path}/{action['id']}/claim", {"compute_node_id": make_node(client, workflow_id)})


def test_each_runner_of_a_persistent_action_has_a_token_of_its_own(walls):
    alice = walls[1]["alice"]
    workflow_id, _ = make(alice, {"a": []})
    path = f"/workflows/{workflow_id}/actions"
    action = act(alice, workflow_id, "on_worker_start", trigger_count=1, persistent=True)
    nodes = [make_node(alice, workflow_id, boot_id="b") for _ in range(3)]
    def enters(token):
        try:
            return bool(torc.Client(walls[0].url, "alice", token).get(f"/workflows/{workflow_id}"))
        except torc.Unauthorized:
            return False
    tokens = [alice.post(f"{path}/{action}/claim", {"compute_node_id": node, "tokens": True})["token"] for node in nodes]
    assert list(map(enters, tokens)) == [True] * 3
    alice.put(f"{path}/{action}/claim", compute_node_id=nodes[1])
    assert list(map(enters, tokens)) == [True, False, True]
    alice.post(f"/compute_nodes/{nodes[2]}/release")
    assert list(map(enters, tokens)) == [True, False, False]
    alice.post(f"/workflows/{workflow_id}/initialize_jobs")
    assert list(map(enters, tokens)) == [False] * 3


def test_the_answer_to_a_new_job_echoes_what_came(client):
    workflow_id, _ = make(client, {})
    for more in ({}, {"scheduler_id": 0}):
        body = {"workflow_id": workflow_id, "name": f"j{len(more)}", "command": "true", **more}
        made = client.post("/jobs", body)
        assert made == {**body, "id": made["id"], "status": "uninitialized",
                        "resource_requirements_id": made["resource_requirements_id"]}


def test_a_path_that_can_be_none_is_refused_and_ends_no_runner(client):
    workflow_id, _ = make(client, {"a": []})
    with pytest.raises(torc.Invalid, match="path: 'a.x00b' is not a non-empty string"):
        client.post("/files", {"workflow_id": workflow_id, "name": "f", "path": "a\0b"})
    runner = torc.Runner(client, workflow_id)
    assert runner._outputs({"output_files": [{"id": 1, "path": "a\0b"}]}) == ([], ["a\0b"])


@pytest.mark.slow
def test_a_server_that_is_lost_while_an_action_is_at_work_does_not_hold_the_runner(tmp_path):
    server = Server(tmp_path / "x.db")
    runner = run_spec(tmp_path, {"a": "true"}, url=server.url, begun="acting", actions=[
        commands_action(
            "on_jobs_complete", "touch ../acting; while test ! -e ../go; do sleep 0.05; done",
            jobs=["a"])], compute_node_wait_for_healthy_database_minutes=0)
    server.kill()
    until(lambda: "the jobs continue" in (tmp_path / "run.log").read_text())
    time.sleep(1)
    assert runner.poll() is None          # its script is at work
    (tmp_path / "go").touch()
    assert runner.wait(60) == 1


@pytest.mark.slow
def test_a_ready_job_that_is_for_another_scheduler_makes_nobody_run_hot(tmp_path, server):
    client, steps = server.client(), []
    workflow_id, ids = make(client, {"a": []}, start=False)
    client.put(f"/workflows/{workflow_id}", {"compute_node_wait_for_new_jobs_seconds": 3})
    schedulers = [client.post("/slurm_schedulers", {"workflow_id": workflow_id, "name": name, "account": "x",
                                                    "nodes": 1, "walltime": "01:00:00"})["id"] for name in "st"]
    client.put(f"/jobs/{ids['a']}", {"scheduler_id": schedulers[0]})
    client.post(f"/workflows/{workflow_id}/initialize_jobs")
    script = textwrap.dedent(f"""
        import torc, os
        class Strict(torc.Runner):
            claim_values = {{"scheduler_config_id": {schedulers[1]}, "strict_scheduler_match": True}}
        raise SystemExit(Strict(torc.Client(os.environ["URL"]), {workflow_id}).run())""")
    with gateway(server, lambda path, _: steps.append(path)) as url:
        done = subprocess.run([PYTHON, "-c", script], cwd=tmp_path, timeout=60, capture_output=True, text=True,
                              env={**os.environ, "URL": url, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 3, done.stderr
    assert sum(path.endswith("runner_step") for path in steps) < 20


def test_a_recovery_script_that_can_be_no_process_is_not_tried_for_ever(run):
    ran = run({"a": {"command": "exit 3", "failure_handler": "h"}}, failure_handlers=[
        {"name": "h", "rules": [{"exit_codes": [3], "max_retries": 1, "recovery_script": "echo " + "x" * 200_000}]}])
    assert ran.code == 1 and [row["status"] for row in ran.results()["a"]] == ["failed"]


# ---- Slurm that answers badly

def allocated(client):
    """A workflow with a running job in allocation 7: (its id, the runner's Conversation)."""
    workflow_id, _ = make(client, {"a": [], "b": []})
    client.post("/scheduled_compute_nodes", {"workflow_id": workflow_id, "scheduler_id": 7, "scheduler_type": "slurm",
                                             "scheduler_config_id": 1, "status": "active", "cluster": "here"})
    runner = Conversation(client, workflow_id, compute_node_type="slurm", boot_id="b", scheduler={
        "type": "slurm", "scheduler_id": 7, "cluster": "here"})
    [job] = runner.step(limit=1)["jobs"]
    runner.step(starts=[{"job_id": job["id"], "attempt_id": job["attempt_id"]}])
    return workflow_id, runner


FORGETS = {"squeue": "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
           "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
           "scontrol": "echo 'ClusterName = here'"}


def test_an_allocation_that_slurm_has_forgotten_is_left_alone(client, programs):
    programs(**FORGETS)
    workflow_id, runner = allocated(client)
    watch = torc.Watch()
    for _ in range(3):
        assert torc.close_ended_allocations(client, workflow_id, watch) == []
    assert statuses(client, workflow_id) == {"a": "running", "b": "ready"}
    [record] = client.page("/scheduled_compute_nodes", workflow_id=workflow_id)["items"]
    assert record["status"] == "active"
    assert torc.Queued("UNKNOWN").phase == torc.Queued("LAUNCH_FAILED").phase == "unknown"


def test_an_allocation_that_never_had_a_runner_is_forgotten_after_ten_minutes(client, programs, monkeypatch):
    programs(**FORGETS)
    workflow_id, _ = make(client, {"a": []})
    client.post("/scheduled_compute_nodes", {"workflow_id": workflow_id, "scheduler_id": 7, "scheduler_type": "slurm",
                                             "scheduler_config_id": 1, "status": "pending", "cluster": "here"})
    watch, now = torc.Watch(), time.monotonic()
    for passed, said in ((0, 0), (599, 0), (601, 1)):
        monkeypatch.setattr(time, "monotonic", lambda passed=passed: now + passed)
        assert len(torc.close_ended_allocations(client, workflow_id, watch)) == said
    [record] = client.page("/scheduled_compute_nodes", workflow_id=workflow_id)["items"]
    assert (record["status"], record["note"]) == ("complete", "UNKNOWN")


def test_slurms_word_on_a_runner_that_still_speaks_is_not_believed(client, programs, monkeypatch):
    programs(squeue="echo '7|COMPLETED|0:00|c1'", scontrol="echo 'ClusterName = here'")
    workflow_id, runner = allocated(client)
    look = torc.Watch.look
    def late(self, ids, now):             # it speaks while Slurm is asked
        runner.step()
        return look(self, ids, now)
    monkeypatch.setattr(torc.Watch, "look", late)
    [sentence] = torc.close_ended_allocations(client, workflow_id)
    assert "has reported since it was declared dead" in sentence
    assert statuses(client, workflow_id)["a"] == "running"
    monkeypatch.setattr(torc.Watch, "look", look)
    client.post("/scheduled_compute_nodes", {"workflow_id": workflow_id, "scheduler_id": 7, "scheduler_type": "slurm",
                                             "scheduler_config_id": 1, "status": "active", "cluster": "here"})
    assert "1 job ready again" in torc.close_ended_allocations(client, workflow_id)[0]


def test_a_job_that_sbatch_says_nothing_of_is_looked_for_and_adopted(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    calls = tmp_path / "calls"
    away = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
    programs(sbatch=f"echo x >> {calls}; {away}", squeue='[ "$5" = mine ] && echo 41; exit 0')
    assert torc.submit_script("script", "mine", dict(os.environ)) == 41
    assert calls.read_text() == "x\n"
    programs(squeue="exit 0", sacct="exit 0")                # Slurm answers: there is none
    with pytest.raises(torc.TorcError, match="may be queued all the same: `squeue --me -n mine`"):
        torc.submit_script("script", "mine", dict(os.environ))
    assert calls.read_text() == "x\n" * 4
    programs(squeue="echo 'Unable to contact slurm controller' >&2; exit 1", sacct="exit 1")
    with pytest.raises(torc.TorcError, match="may be queued all the same"):     # nobody knows: it is not asked for again
        torc.submit_script("script", "mine", dict(os.environ))
    assert calls.read_text() == "x\n" * 5
    programs(sbatch=f"echo x >> {calls}; echo 'sbatch: error: Invalid account' >&2; exit 1")
    with pytest.raises(torc.TorcError, match="Invalid account") as caught:
        torc.submit_script("script", "mine", dict(os.environ))
    assert calls.read_text() == "x\n" * 6 and "queued" not in str(caught.value)


def test_in_a_chain_only_a_job_that_is_not_known_is_adopted(programs, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    programs(squeue="echo 41; echo 42", sacct="exit 0", sbatch="echo 'Socket timed out' >&2; exit 1")
    assert torc.submit_script("script", "torc-wf1-s1", dict(os.environ), {41}) == 42
    with pytest.raises(torc.TorcError, match="may be queued all the same"):
        torc.submit_script("script", "torc-wf1-s1", dict(os.environ), {41, 42})


def test_a_submission_that_may_be_queued_keeps_its_workflow(server, cli, programs, tmp_path, monkeypatch):
    """The worker that starts after all must find the workflow; after a refusal nothing is left."""
    monkeypatch.setattr(torc, "worker_urls", lambda client, named=(): (server.url,))
    monkeypatch.setattr(torc, "job_named", lambda name, known: None)
    spec = {"name": "w", "jobs": [{"name": "a", "command": "true"}],
            "slurm_schedulers": [{"name": "s", "account": "a", "nodes": 1, "walltime": "00:10:00"}],
            "actions": [{"trigger_type": "on_workflow_start", "action_type": "schedule_nodes",
                         "scheduler": "s", "scheduler_type": "slurm", "num_allocations": 1}]}
    (tmp_path / "w.json").write_text(json.dumps(spec))
    for said, left in (("Unable to contact slurm controller", ["w"]), ("Invalid account", ["w"])):
        programs(sbatch=f"echo 'sbatch: error: {said}' >&2; exit 1", squeue="exit 0", scontrol="exit 0")
        code, _, err = cli("submit", str(tmp_path / "w.json"), "--url", server.url)
        assert code and said in err, (rules, code, err)
        with contextlib.closing(server.client()) as client:
            assert [one["name"] for one in client.items("/workflows")] == left


# ---- automatic allocations

ONE_PARTITION = {"sinfo": "echo 'short*|4|4000|1:00:00|(null)|2'", "squeue": "exit 0", "sacct": "exit 0",
                 "scontrol": "case \"$*\" in *config*) echo 'ClusterName = here';; *) echo 'PartitionName=short State=UP "
                             "OverSubscribe=NO';; esac"}


@pytest.fixture
def automatic(server, cli, programs, tmp_path, monkeypatch):
    """automatic(jobs, ...) submits a workflow without a word about allocations; gives run(*words) of the command line,
    which counts what sbatch is given, and a client."""
    monkeypatch.setattr(torc, "worker_urls", lambda client, named=(): (server.url,))
    count = tmp_path / "count"
    count.write_text("")
    programs(**ONE_PARTITION, sbatch=f"echo $@ >> {count}; /usr/bin/wc -l < {count}")

    def run(*words, ok=0, later=True):
        if later:                         # the time to wait has passed
            with contextlib.closing(sqlite3.connect(server.database)) as store, store:
                store.execute("UPDATE workflow_action SET wait_until = 0")
        before = len(count.read_text().splitlines())
        code, out, err = cli(*map(str, words), "--url", server.url)
        assert code == ok, err
        return len(count.read_text().splitlines()) - before, out + err

    def make_spec(jobs, needs=({"name": "small", "num_cpus": 1, "memory": "100m", "runtime": "PT10M"},), **top):
        path = tmp_path / "spec.json"
        path.write_text(json.dumps({"name": "w", "resource_requirements": list(needs), **top, "jobs": [
            {"name": name, "command": "true", "depends_on": after, "resource_requirements": need}
            for name, (need, after) in jobs.items()]}))
        return path
    return types.SimpleNamespace(run=run, spec=make_spec, client=server.client(), programs=programs, count=count)


SMALL_JOBS = {**{f"a{number}": ("small", []) for number in range(10)},
              **{f"b{number}": ("small", ["a0"]) for number in range(10)}}


def test_submit_requests_what_ready_jobs_fill_and_no_more(automatic):
    spec = automatic.spec(SMALL_JOBS)
    number, said = automatic.run("submit", spec, "--dry-run", "--max-allocations", 2)
    assert number == 0 and "2 allocations of scheduler" in said and "--cpus-per-task=4" in said
    assert "--account" not in said        # Slurm's default
    assert not list(automatic.client.items("/workflows"))
    number, said = automatic.run("submit", spec)             # ten jobs, four at a time
    assert number == 3 and "3 allocations submitted: Slurm jobs 1, 2, 3" in said
    assert '3 allocations of scheduler "small_scheduler": time=00:15:00, nodes=1, partition=short, mem=' in said
    for _ in range(2):                    # living ones take them all
        assert automatic.run("status", 1)[0] == 0
    number, said = automatic.run("submit-slurm", 1, ok=1)
    assert number == 0 and "have been submitted before" in said
    automatic.client.put("/scheduled_compute_nodes/2", {"status": "canceled"})
    assert automatic.run("status", 1)[0] == 1                # and one of them is gone


def test_no_more_than_the_maximum_are_queued_or_active(automatic):
    assert automatic.run("submit", automatic.spec(SMALL_JOBS), "--max-allocations", 2)[0] == 2
    assert automatic.run("slurm", "auto", 1, "--max", 2)[0] == 0
    number, said = automatic.run("slurm", "auto", 1, "--max", 5, "--idle", "2m")
    assert number == 1 and "at most 5 at a time; a worker leaves when it has been idle for 2m" in said
    assert automatic.client.get("/workflows/1")["compute_node_wait_for_new_jobs_seconds"] == 120


def test_another_requirement_that_becomes_ready_gets_allocations_that_take_it(automatic):
    needs = [{"name": "small", "num_cpus": 1, "memory": "100m", "runtime": "PT10M"},
             {"name": "large", "num_cpus": 4, "memory": "2g", "runtime": "PT10M"}]
    jobs = {"a": ("small", []), "b": ("large", ["a"])}
    assert automatic.run("submit", automatic.spec(jobs, needs))[0] == 1
    runner = Conversation(automatic.client, 1)
    [job] = runner.step(limit=1)["jobs"]
    runner.step([runner.done(job)])
    assert automatic.run("status", 1)[0] == 1
    names = {one["name"]: one["extra"] for one in automatic.client.items("/slurm_schedulers", workflow_id=1)}
    assert names == {"small_scheduler": "--cpus-per-task=1", "large_scheduler": "--cpus-per-task=4"}


def test_allocations_that_start_no_job_are_asked_for_again_later_and_then_no_more(automatic, monkeypatch):
    automatic.run("submit", automatic.spec({"a": ("small", [])}))
    for number in (1, 2, 3):
        automatic.client.put(f"/scheduled_compute_nodes/{number}", {"status": "complete"})
        asked, said = automatic.run("status", 1)
        assert asked == 0 and "without starting a job" in said
        assert automatic.run("status", 1, later=False)[0] == 0
        assert automatic.run("status", 1)[0] == (number < 3)
    assert "paused: 3 requests" in automatic.run("slurm", "auto", "status", 1)[1]
    assert automatic.run("slurm", "auto", "resume", 1)[0] == 1


def test_submissions_that_slurm_refuses_are_no_allocations_that_started_no_job(automatic):
    automatic.run("submit", automatic.spec({"a": ("small", [])}), "-j", 3, "--walltime", "00:30:00")
    automatic.client.put("/scheduled_compute_nodes/1", {"status": "complete"})
    runner = Conversation(automatic.client, 1)
    [job] = runner.step(limit=1)["jobs"]
    runner.step([runner.done(job)], closing=True)
    automatic.run("jobs", "retry", job["id"])
    automatic.programs(sbatch="echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    for _ in range(4):
        assert "QOSMaxSubmit" in automatic.run("status", 1)[1]
    automatic.programs(sbatch=f"/bin/cat $3 >> {automatic.count}; echo 9")
    asked, said = automatic.run("status", 1)
    assert "1 allocation submitted: Slurm job 9" in said
    script = automatic.count.read_text()
    assert "--max-parallel-jobs=3" in script and "--time=00:30:00" in script


def test_automatic_allocations_pause_and_end_with_the_workflow(automatic):
    _, said = automatic.run("slurm", "auto", "pause", make(automatic.client, {"a": []})[0], ok=1)
    assert "to have it do so:\n  torc slurm auto 1" in said
    assert automatic.run("slurm", "auto", 1)[0] == 1
    assert "paused: by the user" in automatic.run("slurm", "auto", "pause", 1)[1]
    automatic.client.put("/scheduled_compute_nodes/1", {"status": "canceled"})
    assert automatic.run("status", 1)[0] == 0
    automatic.run("slurm", "auto", "resume", 1)
    automatic.client.put("/workflows/1/cancel")
    assert automatic.client.get("/workflows/1/actions/pending", waiting=True) == []


def test_options_of_automatic_allocations_are_refused_where_the_workflow_says_which_it_needs(automatic):
    spec = automatic.spec({"a": ("small", [])}, slurm_schedulers=[{"name": "s", "account": "x"}], actions=[
        {"trigger_type": "on_workflow_start", "action_type": "schedule_nodes", "scheduler": "s", "scheduler_type": "slurm"}])
    number, said = automatic.run("submit", spec, "--partition", "short", ok=2)
    assert number == 0 and "says itself which allocations it needs" in said
    assert not list(automatic.client.items("/workflows"))
    number, said = automatic.run("submit", automatic.spec({"a": (None, [])}), ok=1)
    assert number == 0 and "without resource_requirements it is unknown what to request" in said


def test_an_action_is_changed_only_to_what_it_may_be(client):
    workflow_id, _ = make(client, {"a": []})
    action = client.post(f"/workflows/{workflow_id}/actions", torc.new_automatic(torc.Wishes()))
    path = f"/workflows/{workflow_id}/actions/{action['id']}"
    with pytest.raises(torc.Invalid):
        client.put(path, {"action_config": {"num_allocations": 0}})
    assert client.put(path, {"action_config": {"account": "x", "scheduler_type": None}})["action_config"] == {
        "num_allocations": 10, "account": "x"}
    with pytest.raises(torc.NotFound):
        client.put(f"/workflows/{workflow_id}/actions/99", {"action_config": {}})


def test_one_at_a_time_requests_allocations_and_who_dies_is_succeeded(store, api):
    workflow_id, _ = make(api, {"a": []})
    with store.transaction():
        action = torc.add_action(store, workflow_id, torc.new_automatic(torc.Wishes()))
        torc.claim_action(store, workflow_id, action, None, time.time() - 300)
        assert torc.actions(store, workflow_id, pending=True) == []
        with pytest.raises(torc.Conflict):
            torc.claim_action(store, workflow_id, action, None, time.time())
        store.execute("UPDATE workflow_action SET executed_at = ?", (torc.iso_time(time.time() - 700),))
        assert torc.actions(store, workflow_id, pending=True)
        torc.claim_action(store, workflow_id, action, None, time.time())
        torc.leave_action(store, workflow_id, action, None, time.time(), True)
        assert not torc.actions(store, workflow_id, pending=True)                  # looked at a moment ago
        assert torc.actions(store, workflow_id, pending=True, waiting=True)


# ---- who may be called dead

@pytest.fixture
def sleeper():
    """(a process, its identity as a runner would give it)."""
    process = subprocess.Popen(["sleep", "60"])
    yield process, {**torc.identity(), "pid": process.pid, "pid_started": torc.process_start(process.pid)}
    process.kill(), process.wait()


def test_a_runner_is_dead_when_its_process_is_seen_to_be_gone(sleeper, monkeypatch):
    process, record = sleeper
    assert torc.local_evidence(record) is None
    assert torc.local_evidence({**record, "pid_started": record["pid_started"] - 1}).kind == "process"
    process.kill()                        # a zombie
    until(lambda: torc.process_stat(process.pid)[0] == b"Z")
    assert torc.local_evidence(record).kind == "process"
    process.wait()
    evidence = torc.local_evidence(record)
    assert evidence.kind == "process" and evidence.text.startswith(f"the runner with pid {process.pid} on ")
    for other in ({"hostname": "another"}, {"pid_namespace": 1}, {"pid_started": None}):
        assert torc.local_evidence({**record, **other}) is None


def test_what_cannot_be_seen_in_proc_is_alive(sleeper, monkeypatch):
    _, record = sleeper
    monkeypatch.setattr(torc, "read_bytes", lambda path: b"")           # as with hidepid=2
    assert torc.process_start(record["pid"]) is None and torc.local_evidence(record) is None
    def denied(pid, number):
        raise PermissionError
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", denied)
        assert torc.local_evidence({**record, "pid_started": 1}) is None


WALLS = {"hidepid": ["unshare", "-m", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec setpriv '
                     '--reuid=65534 --clear-groups "$@"', "sh"],
         "another PID namespace": ["unshare", "-p", "-f", "--mount-proc"]}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")
@pytest.mark.parametrize("wall", WALLS)
def test_a_colleague_who_cannot_see_a_runner_does_not_take_it_for_dead(tmp_path, server, wall):
    runner = run_spec(tmp_path, {"a": "echo x >> runs; while test ! -e go; do sleep 0.05; done"},
                      url=server.url, begun="runs")
    place = tmp_path / "colleague"
    place.mkdir()
    shutil.copy(TORC, place / "torc.py")
    for directory in (place, *place.parents):
        if directory.stat().st_mode & 0o005 != 0o005:
            directory.chmod(0o755)
    place.chmod(0o777)
    with open(place / "log", "w") as log:
        other = subprocess.Popen([*WALLS[wall], "/usr/bin/python3", "torc.py", "run", "1", "--url", server.url,
                                  "--allow-owner", "tester"], cwd=place, stdout=log, stderr=log,
                                 env={**os.environ, "HOME": str(place), "USER": "colleague"})
    until(lambda: "running workflow 1" in (place / "log").read_text() or other.poll() is not None, 30)
    time.sleep(7)                         # it looks for the dead every five seconds
    assert other.poll() is None and (tmp_path / "runs").read_text() == "x\n", (place / "log").read_text()
    assert server.client().get("/jobs/1")["attempt_id"] == 1
    (tmp_path / "go").touch()
    assert (runner.wait(60), other.wait(60)) == (0, 0), (place / "log").read_text()
    assert (tmp_path / "runs").read_text() == "x\n" and "is gone" not in (place / "log").read_text()


def test_a_machine_that_booted_again_has_no_runner_of_before(sleeper):
    _, record = sleeper
    before = {**record, "boot_id": "of before"}
    if not record["machine_id"]:
        pytest.skip("this machine has no /etc/machine-id")
    assert torc.local_evidence(before).kind == "reboot"
    for other in ({"machine_id": "another"}, {"machine_id": None}, {"hostname": "another"}):
        assert torc.local_evidence({**before, **other}) is None


def test_a_process_that_took_over_a_number_is_not_taken_for_ours(sleeper):
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    pid = sleeper[0].pid
    assert torc.started_about(pid, now) and not torc.started_about(pid, now - 60)


def test_evidence_older_than_the_last_word_of_a_runner_is_refused(client):
    workflow_id, ids = make(client, {"a": []})
    runner = Conversation(client, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    node = client.get(f"/compute_nodes/{runner.node}")
    runner.step(held=[[job["id"], job["attempt_id"]]])    # it speaks once more
    assert "has reported since it was declared dead" in torc.release(client, node, torc.Evidence("process", "it is gone"))
    assert statuses(client, workflow_id) == {"a": "running"} or statuses(client, workflow_id) == {"a": "pending"}
    node = client.get(f"/compute_nodes/{runner.node}")
    torc.release(client, node, torc.Evidence("process", "it is gone"))
    assert statuses(client, workflow_id) == {"a": "ready"}
    death = client.get(f"/compute_nodes/{runner.node}")["death"]
    assert (death["kind"], death["text"]) == ("process", "it is gone") and torc.parse_time(death["time"])


def rewrite_journal(path, change):
    """Change the header of a journal."""
    records, _ = torc.read_journal(path)
    change(records[0]["header"])
    os.unlink(path)
    journal = torc.Journal(str(path), records[0]["header"])
    for record in records[1:]:
        journal.add(record)
    journal.close(remove=False)


def test_a_live_process_is_not_gone_because_a_second_read_fails(monkeypatch):
    started = torc.process_start(os.getpid())
    answers = [torc.process_stat(os.getpid())]        # then no descriptor is left
    monkeypatch.setattr(torc, "process_stat", lambda pid: answers.pop(0) if answers else [])
    assert not torc.is_gone(os.getpid(), started)


def test_after_a_reboot_a_workflow_goes_on_at_once(tmp_path):
    if not torc.identity()["machine_id"]:
        pytest.skip("this machine has no /etc/machine-id")
    runner = run_spec(tmp_path, {"quick": "echo q >> runs", "a": "echo a >> runs; test -e go || sleep 300"},
                      parallel=2)
    with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"))) as client:
        until(lambda: client.page("/workflows")["items"] and statuses(client, 1) == {
            "quick": "completed", "a": "running"})
    [journal] = (tmp_path / "torc_output" / "journal").glob("*.jsonl")
    runner.kill(), runner.wait()
    until(lambda: not processes_in(tmp_path), what="the end of all processes")
    rewrite_journal(journal, lambda header: header.update(boot_id="of before"))
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db")) as connection, connection:
        connection.execute("UPDATE compute_node SET boot_id = 'of before'")
    (tmp_path / "go").touch()
    started = time.monotonic()
    assert start_run(tmp_path, 1, "--database", tmp_path / "x.db").wait(60) == 0
    assert time.monotonic() - started < 60 and "has rebooted" in (tmp_path / "run.log").read_text()
    assert sorted((tmp_path / "runs").read_text().split()) == ["a", "a", "q"]
    assert not journal.exists()


def test_the_end_of_an_attempt_signals_no_other_attempt(tmp_path):
    """A process of attempt 2 with the runner's mark lives on when attempt 1 is ended."""
    jobs = {attempt: subprocess.Popen(["sleep", "60"], start_new_session=True, env={
        **os.environ, "TORC_RUNNER": "mark", "TORC_JOB_ID": "7", "TORC_RUN_ID": "1",
        "TORC_ATTEMPT_ID": str(attempt)}) for attempt in (1, 2)}
    until(lambda: len(torc.marked_processes("mark")) == 2)
    assert sorted(torc.marked_processes("mark")) == sorted(
        (process.pid, (7, 1, attempt)) for attempt, process in jobs.items())
    for process in jobs.values():
        process.kill(), process.wait()


# ---- the journal

def test_a_damaged_journal_is_read_as_far_as_it_can_be(tmp_path):
    journal = torc.Journal(str(tmp_path / "x.jsonl"), {"pid": 1})
    for number in range(3):
        journal.add({"end": {"text": "für", "number": number}})
    journal.close(remove=False)
    data = Path(journal.path).read_bytes()
    assert data.isascii()
    lines = data.splitlines(keepends=True)
    broken = [lines[0], lines[1].replace(b"number", b"n\xffmber"), lines[2], lines[3][:-5]]
    Path(journal.path).write_bytes(b"".join(broken))
    records, bad = torc.read_journal(journal.path)
    assert (records, bad) == ([{"header": {"pid": 1}}, {"end": {"text": "für", "number": 1}}], 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_journal_on_a_full_disk_keeps_what_it_cannot_write(tmp_path):
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "small", tmp_path / "small"], check=True)
    try:
        journal = torc.Journal(str(tmp_path / "small" / "x.jsonl"), {"pid": 1})
        kept = 0
        while True:
            journal.add({"end": "x" * 1000})
            kept += 1
            if not journal.flush():
                break
        assert "No space left on device" in journal.trouble and str(journal.path) in journal.trouble
        records, bad = torc.read_journal(journal.path)
        assert (len(records), bad) == (kept, 0)               # no half line is there
        subprocess.run(["mount", "-o", "remount,size=1m", tmp_path / "small"], check=True)
        assert journal.flush() and journal.trouble is None
        records, bad = torc.read_journal(journal.path)
        assert (len(records), bad) == (kept + 1, 0)
        journal.close(remove=True)
    finally:
        subprocess.run(["umount", "-l", tmp_path / "small"], check=True)


def test_the_ok_of_a_start_confirms_no_other_start_of_the_attempt(tmp_path, api):
    workflow_id, _ = make(api, {"a": []})
    runner = Conversation(api, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    key = [job["id"], job["run_id"], job["attempt_id"]]
    records = [{"header": {"workflow_id": workflow_id, "compute_node_id": runner.node}},
               {"start": key, "n": 1}, {"ok": [1]},           # it could not be made a process
               {"start": key, "n": 2}, {"end": runner.done(job), "n": 2}]
    assert torc.replay_journal(api, tmp_path / "none", records) == 1
    assert statuses(api, workflow_id) == {"a": "completed"}
    assert torc.replay_journal(api, tmp_path / "none", [*records, {"ok": [2]}]) == 0


# ---- the machine's faults, and the job's

@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_disk_that_fills_while_jobs_end_costs_none(tmp_path):
    (tmp_path / "torc_output").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "small", tmp_path / "torc_output"], check=True)
    try:
        (tmp_path / "trace").mkdir()
        spec = write_spec(tmp_path, {f"j{number:02d}": f"echo x >> trace/j{number:02d}; sleep 0.05"
                                     for number in range(40)})
        with open(tmp_path / "torc_output" / "run.log", "ab") as log:      # as in an allocation
            runner = subprocess.Popen([*COMMAND, "run", str(spec), "--database", str(tmp_path / "x.db"),
                                       "--max-parallel-jobs", "2"], cwd=tmp_path, stdout=log, stderr=log,
                                      stdin=subprocess.DEVNULL)
        until(lambda: len(list((tmp_path / "trace").iterdir())) >= 5)
        with contextlib.suppress(OSError), open(tmp_path / "torc_output" / "ballast", "wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"))) as client:
            until(lambda: sorted(set(statuses(client, 1).values())) == ["completed", "ready"], 60)
            assert runner.poll() is None
            (tmp_path / "torc_output" / "ballast").unlink()
            assert runner.wait(60) == 0
            assert set(statuses(client, 1).values()) == {"completed"}
            assert {path.read_text() for path in (tmp_path / "trace").iterdir()} == {"x\n"}
    finally:
        subprocess.run(["umount", "-l", tmp_path / "torc_output"], check=True)


def test_an_output_directory_that_is_gone_fails_no_job(tmp_path):
    runner = run_spec(tmp_path, {f"j{number}": f"echo x >> runs{number}; while test ! -e go; do sleep 0.05; done"
                                 for number in range(6)}, compute_node_wait_for_new_jobs_seconds=60,
                      parallel=1, begun="runs0")
    (tmp_path / "torc_output" / "job_stdio").rename(tmp_path / "elsewhere")
    (tmp_path / "go").touch()
    with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"))) as client:
        until(lambda: "jobs cannot be started here now: No such file or directory" in (
            tmp_path / "run.log").read_text())
        until(lambda: sorted(statuses(client, 1).values()) == ["completed"] + ["ready"] * 5)
        (tmp_path / "elsewhere").rename(tmp_path / "torc_output" / "job_stdio")
        assert runner.wait(60) == 0
        assert client.page("/results", workflow_id=1, all_runs=True)["total_count"] == 6


def test_a_job_that_this_machine_cannot_start_holds_up_no_other(tmp_path):
    """The file for the output of the first, which comes first each time, is a directory."""
    (tmp_path / "torc_output" / stdio_name(1, 1, 1, 1, "o")).mkdir(parents=True)
    jobs = {"a": {"command": "true", "priority": 9}, **dict.fromkeys("bcd", "true")}
    runner = run_spec(tmp_path, jobs, parallel=4, compute_node_wait_for_new_jobs_seconds=60)
    until(lambda: "running workflow 1" in (tmp_path / "run.log").read_text())
    with contextlib.closing(torc.LocalClient(str(tmp_path / "x.db"))) as client:
        until(lambda: sorted(statuses(client, 1).values()) == ["completed"] * 3 + ["ready"])
        assert statuses(client, 1)["a"] == "ready"
    runner.terminate()
    runner.wait(60)


def test_limits_of_a_container_are_seen_at_the_parents_of_a_leaf_that_is_not_there(tmp_path, monkeypatch):
    read, here = torc.read_text, {"/proc/self/cgroup": "4:memory,cpu:/docker/abc\n0::/docker/abc"}
    monkeypatch.setattr(torc, "CGROUPS", str(tmp_path))
    monkeypatch.setattr(torc, "read_text", lambda path: here.get(path) or read(path))
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(str(2**26))
    assert torc.usable_memory() == 2**26
    (tmp_path / "docker" / "abc").mkdir(parents=True)
    (tmp_path / "docker" / "abc" / "memory.max").write_text(str(2**25))
    assert torc.usable_memory() == 2**25


def test_a_recovery_script_that_this_machine_cannot_start_is_tried_again(tmp_path):
    """The job's stderr, to which it appends, is a directory for a while."""
    runner, calls = torc.Runner.__new__(torc.Runner), []
    runner.draining, runner.ended = False, threading.Event()
    runner.workflow = {"compute_node_wait_for_new_jobs_seconds": 90}
    runner.ended.wait = lambda seconds: calls.append("rests")
    runner._submit_completion = lambda child: calls.append(child.done.get("requeue"))
    def script(*_):
        calls.append("tries")
        if len(calls) < 3:
            raise BlockingIOError
        return 0
    runner._run_script = script
    child = torc.Child({}, None)
    child.environment, child.done = {}, {"return_code": 1}
    child.rule = {"recovery_script": "x"}
    runner._recover(child)
    assert calls == ["tries", "rests", "tries", True]


def test_a_command_too_long_for_an_argument_leaves_no_script(run):
    ran = run({"a": "echo " + "x" * 200_000 + " > /dev/null"})
    assert ran.code == 0 and not list((ran.directory / "torc_output" / "journal").iterdir())


def test_a_thread_that_cannot_be_started_ends_no_loop(monkeypatch):
    def full(self):
        raise RuntimeError("can't start new thread")
    assert torc.start_thread(lambda: None)
    monkeypatch.setattr(threading.Thread, "start", full)
    assert not torc.start_thread(lambda: None)


@pytest.mark.parametrize("left, near", [(500, False), (3, True), (None, True)])
def test_time_that_slurm_has_added_or_suspended_is_asked_for_before_jobs_are_ended(left, near):
    runner = torc.SlurmRunner.__new__(torc.SlurmRunner)
    now = time.monotonic()
    runner.limits, runner.end_time = torc.read_limits({}), now + 10
    runner.from_slurm, runner.interrupted = True, 0
    runner._ask_time_left = lambda **how: left
    assert now >= runner._stop_at()
    runner._check_end()
    assert (now >= runner._stop_at()) is near
    runner.from_slurm, runner.end_time = False, now + 10     # the user's own limit, or Slurm's last warning
    runner._check_end()
    assert now >= runner._stop_at()


def test_a_node_of_an_allocation_that_starts_none_of_three_jobs_gives_up(monkeypatch):
    for kind, hopeless in ((torc.Runner, False), (torc.SlurmRunner, True)):
        runner = kind.__new__(kind)
        runner.workflow, runner.fault_since = {"compute_node_wait_for_new_jobs_seconds": 90}, time.monotonic()
        for runner.tries in (1, 2):
            assert not runner._is_hopeless()
        runner.tries = 3
        assert runner._is_hopeless() is hopeless
        runner.fault_since -= 90
        assert runner._is_hopeless()


def test_a_log_that_cannot_be_written_swallows_nothing(tmp_path, capsys):
    progress = torc.Progress(False, str(tmp_path / "log"))
    good, progress.log = progress.log, os.open("/dev/full", os.O_WRONLY)
    progress.say("one")
    assert capsys.readouterr().err == "torc: one\n"
    os.close(progress.log)
    progress.log = good
    progress.say("two")
    progress.close()
    assert re.findall(r"\] (\w+)", (tmp_path / "log").read_text()) == ["one", "two"]


# ---- signals

def test_a_failure_that_waited_to_be_told_ended_when_it_ended(run):
    ran = run({"a": "date +%s%N > ended; exit 3"})
    [result] = ran.results()["a"]
    ended = int((ran.directory / "ended").read_text()) / 1e6
    assert -2 < torc.parse_time(result["completion_time"]) - ended < 1000 * torc.Runner.failure_delay_s


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_for_a_checkpoint_is_handed_on(tmp_path, number):
    name = signal.Signals(number).name
    runner = run_spec(tmp_path, {"a": f"trap 'touch saved' {name}; touch begun; while test ! -e saved; do "
                                      "sleep 0.05; done; true"}, begun="begun")
    runner.send_signal(number)
    assert runner.wait(60) == 0 and (tmp_path / "saved").exists()


def signal_together(directory, gap):
    """A runner whose jobs get SIGTERM `gap` seconds before it; (its end, seconds that really lay between)."""
    directory.mkdir()
    runner = run_spec(directory, {
        "traps": "test -e again && exit 0; trap 'exit 3' TERM; touch b1; sleep 60 & wait $!",
        "python": f"test -e again && exit 0; touch b2; exec {PYTHON} -c 'import signal,sys,time;"
                  "signal.signal(15,lambda *_:sys.exit(1));open(\"b5\",\"w\");time.sleep(60)'",
        "sleeps": "test -e again && exit 0; touch b3; exec sleep 60",
        "saves": "trap 'exit 0' TERM; touch b4; sleep 60 & wait",
        "after": {"command": "true", "depends_on": ["traps", "sleeps"]}}, parallel=4)
    until(lambda: all((directory / f"b{number}").exists() for number in (1, 2, 3, 4, 5)))
    jobs = [pid for pid in processes_in(directory) if torc.process_stat(pid)[1:2] == [str(runner.pid).encode()]
            and os.getpgid(pid) == pid]
    moments = []
    for pids, wait in ((jobs, max(0, gap)), ([runner.pid], max(0, -gap)), (jobs, 0))[gap < 0:]:
        moments.append(time.monotonic())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(wait)
    return runner.wait(60), moments[1] - moments[0]


@pytest.mark.parametrize("gap", [-0.05, -0.002, 0, 0.002, 0.05])
def test_a_signal_to_jobs_and_runner_together_fails_no_job(tmp_path, gap):
    for number in range(9):               # on a busy machine the second signal may come too late
        directory = tmp_path / str(number)
        code, between = signal_together(directory, gap)
        if between < 0.7 * torc.Runner.failure_delay_s:
            break
    assert code == 143 and between < torc.Runner.failure_delay_s
    with contextlib.closing(torc.LocalClient(str(directory / "x.db"))) as client:
        assert statuses(client, 1) == {"traps": "ready", "python": "ready", "sleeps": "ready",
                                       "saves": "completed", "after": "blocked"}, (directory / "run.log").read_text()
        (directory / "again").touch()
        assert start_run(directory, 1, "--database", directory / "x.db").wait(60) == 0


def test_a_runner_that_ends_its_script_sends_no_steps_meanwhile(tmp_path, server):
    steps = []
    spec = write_spec(tmp_path, {"a": "true"}, actions=[{
        "trigger_type": "on_jobs_complete", "jobs": ["a"], "action_type": "run_commands",
        "commands": ["trap '' TERM; touch ../acting; while test ! -e ../go; do sleep 0.05; done"]}])
    with gateway(server, lambda path, _: steps.append(path)) as url:
        runner = start_run(tmp_path, spec, "--url", url)
        until((tmp_path / "acting").exists)
        runner.terminate()
        until(lambda: "signal 15" in (tmp_path / "run.log").read_text())
        time.sleep(1)
        before = sum(path.endswith("runner_step") for path in steps)
        time.sleep(1)
        assert sum(path.endswith("runner_step") for path in steps) - before <= 3
        (tmp_path / "go").touch()
        assert runner.wait(60) == 143


def test_on_a_terminal_a_bar_counts_the_jobs(tmp_path):
    import pexpect
    import pyte
    spec = write_spec(tmp_path, {f"j{number}": "sleep 0.5" for number in range(12)})
    screen = pyte.Screen(100, 24)
    stream = pyte.ByteStream(screen)
    child = pexpect.spawn(PYTHON, [TORC, "run", str(spec), "--database", str(tmp_path / "x.db"),
                                   "--max-parallel-jobs", "4"], cwd=str(tmp_path),
                          dimensions=(24, 100), env={**os.environ, "TERM": "linux"})
    seen = set()
    with contextlib.suppress(pexpect.EOF):
        while True:
            stream.feed(child.read_nonblocking(4096, 30))
            seen.update(line.rstrip() for line in screen.display if re.match(r"\[[#.]+\] \d+/12", line))
    child.close()
    assert child.exitstatus == 0
    assert any("running" in line for line in seen), seen
    assert any(line.endswith("] 12/12, 12 completed, " + line.split(", ")[-1]) for line in seen), seen
    assert all(len(line) <= 100 for line in seen)


# ==================================================================================================
# 12 Slurm
# ==================================================================================================

def slurm_bytes(text):
    return torc.slurm_number(text, 1024)


@pytest.mark.parametrize("function, text, value", [
    (torc.slurm_seconds, "4:05", 245.0), (torc.slurm_seconds, "1-02:00:00", 93_600.0),
    (torc.slurm_seconds, "UNLIMITED", None), (torc.slurm_seconds, "INVALID", None),
    (torc.slurm_seconds, "NOT_SET", None), (slurm_bytes, "1564K", 1564 * 1024),
    (slurm_bytes, "3.5M", 3_670_016), (slurm_bytes, "0", 0),
    (slurm_bytes, "", None), (torc.slurm_seconds, "00:00.120", 0.12),
    (torc.slurm_seconds, "00:01:02", 62.0), (torc.slurm_seconds, "1-00:00:01", 86_401.0),
    (torc.slurm_seconds, "", None)])
def test_what_slurm_prints_is_read(function, text, value):
    assert function(text) == value


def fake_program(directory, name, text):
    """A shell script in place of a Slurm program, first on the PATH that is returned."""
    path = directory / "slurm" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return f"{path.parent}{os.pathsep}{os.environ['PATH']}"


def test_the_queue_tells_what_waits_runs_and_has_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_program(tmp_path, "squeue", """echo "$@" >> asked
        echo '7|PENDING|10:00|(Resources)'; echo '8|RUNNING|9:30|c[1-2]'; echo '9|TIMEOUT|0:00|c1'"""))
    monkeypatch.chdir(tmp_path)
    watch = torc.Watch()
    found = watch.look({7, 8, 9, 10}, 100.0)
    assert {number: entry.phase for number, entry in found.items()} == {
        7: "pending", 8: "active", 9: "over", 10: "unknown"}
    assert found[8].time_left_s == 570 and found[7].where == "(Resources)"
    watch.look({7, 9}, 159.0)             # within the minute: not asked again
    assert len((tmp_path / "asked").read_text().splitlines()) == 1
    watch.look({7}, 161.0), watch.look({7, 11}, 162.0)
    assert len((tmp_path / "asked").read_text().splitlines()) == 3


def test_an_allocation_without_a_word_about_memory_has_what_slurm_gave_it(programs):
    programs(scontrol="echo 'JobId=7 NumNodes=2 AllocTRES=cpu=4,mem=1.50G,node=2 Other=1'")
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_CPUS_PER_NODE": "2(x2)", "SLURM_JOB_NUM_NODES": "2"}
    assert torc.read_allocation(environ).memory_bytes == 768 * 2**20
    assert torc.read_allocation({**environ, "SLURM_MEM_PER_NODE": "300"}).memory_bytes == 300 * 2**20
    programs(scontrol="exit 1")
    assert torc.read_allocation(environ).memory_bytes == torc.usable_memory()


@pytest.mark.parametrize("environ, alone", [
    ({"SLURM_JOB_ID": "7"}, False), ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, True),
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "4294967290"}, False), ({}, None),      # salloc's interactive step
    ({"SLURM_JOB_ID": "7", "TORC_RUNNER": "x"}, None)])
def test_run_takes_an_allocation_of_the_users_own_for_its_machine(api, programs, monkeypatch, environ, alone):
    programs(scontrol="exit 1")
    for name, value in {"SLURM_JOB_ID": "", "TORC_RUNNER": None, **environ}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    runner = torc.runner_here(api, 1, torc.RunOptions())
    assert getattr(runner, "alone", None) is alone
    os.close(runner.wake_pipe[0]), os.close(runner.wake_pipe[1])


def test_a_queue_that_cannot_be_asked_says_nothing_about_allocations(tmp_path, monkeypatch):
    monkeypatch.setattr(torc.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("PATH", fake_program(
        tmp_path, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller "
        "(connect failure)' >&2; exit 1"))
    with pytest.raises(torc.TorcError, match="squeue: .*Unable to contact slurm controller"):
        torc.ask_queue([7])
    monkeypatch.setenv("PATH", fake_program(
        tmp_path, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"))
    assert torc.ask_queue([7]) == {}
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(torc.TorcError, match="there is no squeue on the PATH"):
        torc.ask_queue([7])


def script_of(words=("python", "torc.py"), request=None, workflow=None, **scheduler):
    """An allocation's script."""
    request = request or torc.WorkerRequest("/out put/100%", "/work", ("http://a:1",))
    return torc.allocation_script(
        {"id": 3, **(workflow or {})}, {"id": 1, "name": "s", "account": "acc", "nodes": 1,
                                        "walltime": "04:00:00", **scheduler}, "wf3_1_1", request,
        list(words), "me")


def test_the_batch_script_names_everything_and_can_be_run(tmp_path):
    text = script_of(partition="short", mem="10g", gres="gpu:2", extra="#SBATCH --exclusive\n"
                     "--constraint=a&b", workflow={"slurm_defaults": json.dumps({
                         "reservation": "my own", "account": "other", "requeue": True,
                         "no-kill": False})})
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        "#SBATCH --job-name=wf3_1_1", "#SBATCH --output='/out put/100%%/slurm_output_wf3_sl%j.o'",
        "#SBATCH --error='/out put/100%%/slurm_output_wf3_sl%j.e'", "#SBATCH --open-mode=append",
        "#SBATCH --chdir=/work", "#SBATCH --time=04:00:00", "#SBATCH --account=acc",
        "#SBATCH --nodes=1", "#SBATCH --partition=short", "#SBATCH --mem=10g", "#SBATCH --gres=gpu:2",
        "#SBATCH --signal=B:TERM@60", "#SBATCH --reservation='my own'", "#SBATCH --requeue",
        "#SBATCH --exclusive", "#SBATCH --constraint=a&b"]
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    short = script_of(walltime="00:04:00")
    assert "--signal" not in short        # Slurm may send it a minute early
    with pytest.raises(torc.UsageError, match="line break"):
        script_of(partition="a\n#SBATCH --x")


def test_several_nodes_get_a_worker_each(tmp_path):
    request = torc.WorkerRequest("/out", "/work", ("http://a:1",), one_worker_per_node=True)
    text = script_of(("py", "torc.py", "slurm-job-runner"), request, nodes=3)
    assert "exec srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --overlap --cpu-bind=none --mem=0 " \
        "--kill-on-bad-exit=0 --wait=0 py torc.py slurm-job-runner\n" in text
    assert "--signal" not in text         # srun would end the workers at once


@pytest.mark.parametrize("scheduler, defaults, variable, known", [
    ({}, {}, None, False), ({}, {}, "NONE", True), ({}, {}, "ALL", False), ({}, {}, "NIL", True),
    ({"extra": "--export=NONE"}, {}, None, True), ({}, {"export": "ALL,X=1"}, None, False),
    ({}, {"export": "HOME"}, None, True)])
def test_sites_that_export_nothing_are_known(monkeypatch, scheduler, defaults, variable, known):
    if variable:
        monkeypatch.setenv("SBATCH_EXPORT", variable)
    assert torc.exports_nothing(scheduler, defaults) is known


def test_workers_look_for_the_server_where_compute_nodes_can_reach_it(server, tmp_path):
    client = server.client()
    with pytest.raises(torc.Unreachable, match="listens on this machine only.*torc-server run --host "
                                               f"0.0.0.0 --port {server.port}"):
        torc.worker_urls(client)
    assert torc.worker_urls(client, ["http://login:99"]) == ("http://login:99/torc-service/v1",)
    client.close()
    local = torc.LocalClient(str(tmp_path / "local.db"))
    with pytest.raises(torc.UsageError, match="compute nodes cannot work on the database file"):
        torc.worker_urls(local)
    local.close()


def test_an_allocation_is_read_from_slurms_variables(monkeypatch):
    monkeypatch.setattr(torc, "usable_memory", lambda: 8 * 2**30)
    given = {"SLURM_JOB_ID": "17", "SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "2",
             "SLURM_JOB_CPUS_PER_NODE": "4(x2)", "SLURM_MEM_PER_CPU": "1000"}
    assert torc.read_allocation(given) == (17, 1, 2, 4, 4000 * 2**20, 0)
    assert torc.read_allocation({**given, "SLURM_MEM_PER_NODE": "99999"}).memory_bytes == 8 * 2**30
    assert torc.read_allocation({**given, "SLURM_JOB_CPUS_PER_NODE": "8,104(x2),16"}).cpus == 8
    with pytest.raises(torc.UsageError, match="there is no SLURM_JOB_ID"):
        torc.read_allocation({})


def test_new_allocations_leave_out_nodes_that_failed_by_themselves(server, tmp_path, monkeypatch):
    client = server.client()
    workflow_id, _ = make(client, {"a": []})
    runners = [Conversation(client, workflow_id, compute_node_type="slurm", boot_id="b", scheduler={
        "type": "slurm", "scheduler_id": number, "node": f"c{number}"}) for number in range(1, 5)]
    for runner, kind, reason in zip(runners, ("allocation", "allocation", "reboot"), ("NODE_FAIL", "TIMEOUT", "it did")):
        client.post(f"/compute_nodes/{runner.node}/release", kind=kind, reason=reason)
    runners[3].step(closing=True, fault="No space left on device")
    texts = []
    monkeypatch.setattr(torc, "submit_script", lambda path, name, env, known: texts.append(open(path).read()) or 7)
    monkeypatch.setattr(torc, "cluster_name", lambda: "here")
    request = torc.WorkerRequest(str(tmp_path / "out"), str(tmp_path), ("http://a:1",))
    scheduler = client.post("/slurm_schedulers", {"workflow_id": workflow_id, "name": "s", "account": "acc", "nodes": 1,
                                                  "walltime": "01:00:00"})
    torc.submit_allocations(client, client.get(f"/workflows/{workflow_id}"), scheduler, 1, request)
    assert "#SBATCH --exclude=c1,c3,c4\n" in texts[0]
    with contextlib.closing(torc.Store(server.database)) as store:
        assert torc.departure_text(store, runners[3].node) == (
            "ended; it could start no jobs: No space left on device; new allocations leave it out")
    for number in range(5, 11):           # so many: it is not the nodes
        runner = Conversation(client, workflow_id, scheduler={"type": "slurm", "node": f"c{number}"})
        runner.step(closing=True, fault="No space left on device")
    assert client.get(f"/workflows/{workflow_id}/failing_nodes") == {"exclude": None}


def test_a_dead_allocations_jobs_get_what_ended_them(client):
    workflow_id, ids = make(client, {"a": [], "b": ["a"], "c": []})
    runner = Conversation(client, workflow_id)
    jobs = runner.step(limit=2)["jobs"]
    runner.step(starts=[{"job_id": jobs[0]["id"], "attempt_id": 1}])
    answer = client.post(f"/compute_nodes/{runner.node}/release", status="terminated",
                         return_code=152, reason="its allocation ended: TIMEOUT")
    assert answer == {"requeued": [ids["c"]], "canceled": 1}
    assert statuses(client, workflow_id) == {"a": "terminated", "b": "canceled", "c": "ready"}
    [result] = client.items("/results", workflow_id=workflow_id, include_stderr=True)
    assert (result["return_code"], result["status"]) == (152, "terminated")
    assert "its allocation ended: TIMEOUT" in client.get(f"/jobs/{ids['a']}/why")["sentence"]
    with pytest.raises(torc.Invalid, match="ready is not one of a job that was ended"):
        client.post(f"/compute_nodes/{runner.node}/release", status="ready")


@pytest.mark.parametrize("state, ended", [
    ("TIMEOUT", {"status": "terminated", "return_code": 152}),
    ("OUT_OF_MEMORY", {"status": "failed", "return_code": 137}), ("CANCELLED", {}),
    ("NODE_FAIL", {}), ("PREEMPTED", {}), ("FAILED", {}), ("UNKNOWN", {})])
def test_the_fate_of_jobs_follows_slurms_state(state, ended):
    assert torc.ended_as(torc.VERDICTS.get(state), torc.read_limits({})) == ended


def test_a_slurm_job_is_stored_once(client):
    workflow_id, _ = make(client, {"a": []})
    body = {"workflow_id": workflow_id, "scheduler_id": 7, "scheduler_type": "slurm",
            "scheduler_config_id": 1, "status": "active"}
    first = client.post("/scheduled_compute_nodes", body, once=True)
    assert client.post("/scheduled_compute_nodes", {**body, "status": "pending"}, once=True) == first
    assert client.post("/scheduled_compute_nodes", body)["id"] != first["id"]


def test_an_action_that_failed_is_pending_again(client):
    workflow_id, _ = make(client, {"a": []}, start=False)
    path = f"/workflows/{workflow_id}/actions"
    action = client.post(path, {"workflow_id": workflow_id, "trigger_type": "on_workflow_start",
                                "trigger_count": 1, "action_type": "schedule_nodes",
                                "action_config": {"scheduler_type": "slurm"}})
    client.post(f"{path}/{action['id']}/claim", {})
    assert client.get(f"{path}/pending") == []
    client.delete(f"{path}/{action['id']}/claim")
    assert client.get(f"{path}/pending") == []               # for a minute
    assert [pending["id"] for pending in client.get(f"{path}/pending", waiting=True)] == [action["id"]]
    with pytest.raises(torc.NotFound):
        client.delete(f"{path}/99/claim")


GB = 2**30
NEED = {"name": "r", "memory": "1g", "runtime": "PT1H"}


@pytest.mark.parametrize("need, result, peak, cause, change", [
    (NEED, {"return_code": 137, "exec_time_minutes": 5}, 3 * GB, "memory", {"memory": "4608m"}),
    (NEED, {"return_code": 137, "exec_time_minutes": 5}, 0, "memory", {"memory": "1536m"}),
    (NEED, {"return_code": 1, "exec_time_minutes": 5}, 2 * GB, "memory", {"memory": "3g"}),
    (NEED, {"return_code": 137, "exec_time_minutes": 55}, 0, "runtime", {"runtime": "PT84M"}),
    (NEED, {"return_code": 152, "exec_time_minutes": 58}, 0, "runtime", {"runtime": "PT84M"}),
    (NEED, {"return_code": 152, "exec_time_minutes": 90}, 0, "runtime", {"runtime": "PT126M"}),
    (NEED, {"return_code": 152, "exec_time_minutes": 5}, 0, "lost", {}),
    (NEED, {"return_code": -128, "exec_time_minutes": 0}, 0, "lost", {}),
    (NEED, {"return_code": 1, "exec_time_minutes": 5}, 0, "unknown", {}),
    (NEED, {"return_code": 1, "exec_time_minutes": 58}, 0, "unknown", {}),
    ({**NEED, "name": "default", "memory": "1m"}, {"return_code": 1, "exec_time_minutes": 5}, GB,
     "unknown", {}),
    ({**NEED, "name": "default", "memory": "1m"}, {"return_code": 137, "exec_time_minutes": 5}, 0,
     "unknown", {}),
    ({**NEED, "name": "default", "memory": "1m"}, {"return_code": 137, "exec_time_minutes": 5}, GB,
     "memory", {"memory": "1536m"}),
])
def test_a_failure_is_diagnosed(need, result, peak, cause, change):
    found, _, changed = torc.diagnose(
        False, result["return_code"], result["exec_time_minutes"] * 60, peak,
        (need["name"], *torc.parsed_requirements(need).values(), None), {"memory": 137, "time": 152})
    assert (found, changed) == (cause, change)


def test_what_jobs_write_is_the_users_own(run):
    ran = run({"a": "echo mine"})
    assert ran.code == 0
    assert (ran.directory / "torc_output").stat().st_mode & 0o777 == 0o700


def test_recover_raises_only_what_failed_and_runs_it_again(run, cli, monkeypatch):
    hungry = ("test $TORC_ATTEMPT_ID = 2 || python3 -c 'x = bytearray(200 * 2**20); import time; "
              "time.sleep(4)'")
    ran = run({"a": {"command": hungry, "resource_requirements": "r"},
               "b": {"command": "true", "resource_requirements": "r"}, "c": "exit 3"},
              resource_requirements=[{"name": "r", "num_cpus": 1, "memory": "50m"}])
    assert ran.code == 1, ran.log
    monkeypatch.setenv("TORC_DATABASE", ran.client.path)
    before = cli_json(cli, "recover", 1, "--dry-run")
    assert [(job["job_name"], job["cause"]) for job in before["jobs"]] == [("a", "memory")]
    assert [job["job_name"] for job in before["skipped"]] == ["c"]
    code, out, _ = cli("recover", 1)
    assert code == 0 and "1 job of workflow 1 to run again\n" in out
    needs = {job["name"]: job["resource_requirements_id"]
             for job in cli_json(cli, "jobs", "list", 1)["jobs"]}
    assert needs["a"] != needs["b"]
    assert start_run(ran.directory, 1, "--database", ran.client.path).wait(60) == 1
    assert statuses(ran.client, 1) == {"a": "completed", "b": "completed", "c": "failed"}
    code, _, err = cli("recover", 1)
    assert code == 1 and "1 job failed for other reasons: --retry-unknown" in err
    code, _, err = cli("recover", 1, "--recovery-hook", "test $TORC_WORKFLOW_ID = 2 #")
    assert code == 1 and "so nothing was changed" in err
    cli("recover", 1, "--recovery-hook", "test 1 =", ok=0)
    assert statuses(ran.client, 1)["c"] == "ready"


@pytest.mark.slow
def test_watch_sees_the_end_of_a_workflow_without_slurm(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = write_spec(tmp_path, {"a": "sleep 1", "b": "exit 1"})
    runner = start_run(tmp_path, spec)
    until(lambda: (tmp_path / "torc_output" / "torc.db").exists()
          and cli_json(cli, "workflows", "list")["workflows"])
    code, _, err = cli("watch", 1)
    assert code == 1 and "workflow 1 has ended: 1 completed, 1 failed" in err
    assert runner.wait(20) == 1
    assert "has ended" in next((tmp_path / "torc_output").glob("watch_*_wf1.log")).read_text()


HOURS = 3600
SCONTROL = ("PartitionName={} Default=NO MaxNodes={} MaxTime=1-00:00:00 MinNodes={} State={}"
            " OverSubscribe={} RootOnly=NO MaxCPUsPerNode=UNLIMITED MaxMemPerNode=UNLIMITED")


def scontrol(name, most="UNLIMITED", least=0, state="UP", shared="NO"):
    """A line of `scontrol -o show partition`."""
    return SCONTROL.format(name, most, least, state, shared)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """programs(sinfo="script", ...) puts only these programs on the PATH."""
    directory = tmp_path / "programs"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))

    def write(**scripts):
        for name, script in scripts.items():
            (directory / name).write_text(f"#!/bin/sh\n{script}\n")
            (directory / name).chmod(0o755)

    return write


# ---- programs

def test_a_program_gives_its_code_and_what_it_printed(programs):
    programs(squeue="echo out; echo err >&2; exit 3")
    assert torc.run_program(["squeue"]) == (3, "out\n", "err\n")


def test_a_program_that_is_missing_or_hangs_is_named(programs):
    programs(squeue="while :; do :; done")
    with pytest.raises(torc.TorcError, match="there is no sinfo on the PATH: is this a host"):
        torc.run_program(["sinfo"])
    with pytest.raises(torc.TorcError, match="squeue has not answered within 0.2 s"):
        torc.run_program(["squeue"], timeout=0.2)


# ---- HPC profiles

def test_the_built_in_profiles_have_their_partitions():
    kestrel, dane = torc.BUILT_IN_PROFILES["kestrel"], torc.BUILT_IN_PROFILES["dane"]
    assert (len(kestrel.partitions), len(dane.partitions)) == (15, 6)
    for one in kestrel.partitions + dane.partitions:
        assert one.cpus_per_node in (104, 112, 128) and 240_000 < one.memory_mb <= 2_000_000
        assert one.max_walltime_secs or one.name == "pall"
        assert bool(one.gpus_per_node) == bool(one.gpu_type)


@pytest.mark.parametrize("text, gpus", [
    ("(null)", (None, None)), ("", (None, None)), ("gpu:4", (4, None)), ("gpu", (1, None)),
    ("gpu:a100:4(S:0-1)", (4, "a100")), ("gpu:3090:2", (2, "3090")), ("gpu:h100", (1, "h100")),
    ("nvme:1,gpu:a100:2(S:0,2),gpu:v100:2(S:1)", (4, "a100")), ("craynetwork:4", (None, None))])
def test_gpus_are_counted_in_generic_resources(text, gpus):
    assert torc.gpus_in(text) == gpus


@pytest.mark.parametrize("line, more, expected", [
    ("debug*|4|4000|1:00:00|(null)|2", scontrol("debug"),
     {"name": "debug", "cpus_per_node": 4, "memory_mb": 4000, "max_walltime_secs": 3600,
      "max_nodes": 2, "gpus_per_node": None, "shared": True, "requires_explicit_request": True,
      "features": ("default", "debug")}),
    ("batch|64+|190000+|infinite|(null)|1.5K", scontrol("batch", "UNLIMITED", 0, "UP", "EXCLUSIVE"),
     {"cpus_per_node": 64, "memory_mb": 190_000, "max_walltime_secs": None, "max_nodes": 1500,
      "shared": False, "min_nodes": None}),
    ("wide|64|190000|10-00:00:00|(null)|40", scontrol("wide", 16, 4),
     {"max_walltime_secs": 864_000, "max_nodes": 16, "min_nodes": 4}),
    ("short|2+|1|10:00|(null)|2", "", {"cpus_per_node": 2, "memory_mb": None,
                                       "max_walltime_secs": 600}),
    ("gpu|128|500000|UNLIMITED|gpu:a100:4(S:0-1)|8", scontrol("gpu"),
     {"gpus_per_node": 4, "gpu_type": "a100", "max_walltime_secs": None}),
    ("old|8|8000|n/a|(null)|3", scontrol("old", state="DOWN"), None),
    ("sinfo: something odd", "", None), ("", "", None)])
def test_partitions_are_read_from_what_slurm_prints(monkeypatch, line, more, expected):
    monkeypatch.setattr(torc, "run_program", lambda words, *_: (
        0, line if words[0] == "sinfo" else more, ""))
    found = torc.slurm_profile().partitions if expected else ()
    if not expected:
        with pytest.raises(torc.TorcError, match="names no usable partition"):
            torc.slurm_profile()
    assert len(found) == (expected is not None)
    for name, value in (expected or {}).items():
        assert getattr(found[0], name) == value, name


def want(cpus, memory, walltime_s, gpus=0, nodes=1):
    """What a job needs of each node, and for how long."""
    return torc.Need(cpus, memory, gpus, nodes), walltime_s


def test_a_partition_with_nodes_of_two_kinds_is_read_as_two():
    found = torc.read_partitions([row.split("|") for row in (
        "mix*|64|256000|2-00:00:00|(null)|100", "mix*|64|256000|2-00:00:00|(null)|20",
        "mix*|64|512000|2-00:00:00|gpu:a100:4|8")], scontrol("mix"))
    assert [(one.memory_mb, one.gpus_per_node, one.max_nodes) for one in found] == [
        (256_000, None, 120), (512_000, 4, 8)]
    profile = torc.Profile("x", "x", "", (), found)
    assert torc.best_partition(profile, *want(4, GB, 60)).gpus_per_node is None
    assert torc.best_partition(profile, *want(4, GB, 60, gpus=1)).gpus_per_node == 4


@pytest.mark.parametrize("sign, here", [
    (torc.Detection("env", "kestrel", "NREL_CLUSTER"), True),
    (torc.Detection("env", "other", "NREL_CLUSTER"), False),
    (torc.Detection("env", "x", "UNSET_VARIABLE"), False),
    (torc.Detection("hostname", r"^kl\d+"), True), (torc.Detection("hostname", r"^l\d+"), False),
    (torc.Detection("file", "/"), True), (torc.Detection("file", "/no/such/file"), False)])
def test_signs_of_a_cluster_are_seen(monkeypatch, sign, here):
    monkeypatch.setenv("NREL_CLUSTER", "kestrel")
    assert torc.is_here(sign, "kl1") == here


@pytest.mark.parametrize("profile, need, name", [
    ("kestrel", (4, 2 * GB, HOURS), "shared"),              # small
    ("kestrel", (26, 60_000 * 2**20, HOURS), "shared"),
    ("kestrel", (27, 2 * GB, HOURS), "short"),              # not small
    ("kestrel", (4, 59 * GB, HOURS), "short"),
    ("kestrel", (4, 2 * GB, 72 * HOURS), "sharedl"),
    ("kestrel", (104, 100 * GB, 5 * HOURS), "standard"),
    ("kestrel", (104, 100 * GB, 72 * HOURS), "long"),
    ("kestrel", (104, 300 * GB, HOURS), "medmem"),
    ("kestrel", (104, 1500 * GB, 50 * HOURS), "bigmeml"),
    ("kestrel", (104, 100 * GB, HOURS, 0, 300), "short"),   # several nodes
    ("kestrel", (4, 2 * GB, HOURS, 0, 2), "short"),
    ("kestrel", (8, 8 * GB, HOURS, 1), "gpu-h100s"),
    ("kestrel", (8, 8 * GB, 5 * HOURS, 4), "gpu-h100"),
    ("kestrel", (120, 8 * GB, HOURS), None),                # CPU jobs take no GPU nodes
    ("kestrel", (8, 8 * GB, HOURS, 5), None),
    ("kestrel", (8, 8 * GB, 300 * HOURS), None),
    ("dane", (4, 2 * GB, HOURS), "pbatch"),
    ("dane", (4, 2 * GB, 48 * HOURS), None),                # pserial is only for who names it
    ("dane", (4, 2 * GB, HOURS, 1), None)])
def test_the_best_partition_for_a_job(profile, need, name):
    profile = torc.BUILT_IN_PROFILES[profile]
    best = torc.best_partition(profile, *want(*need))
    assert (best.name if best else None) == name
    if not best:
        assert torc.why_no_partition(profile, *want(*need)).startswith(
            f"no partition of {profile.name} accepts ")


def test_why_no_partition_names_what_is_too_much():
    assert torc.why_no_partition(torc.DANE, *want(200, 2 * GB, 48 * HOURS)) == (
        "no partition of dane accepts 200 CPUs and 2.0 GB for 2d00h (pserial and pall: only 112 CPUs a "
        "node; pdebug: only 112 CPUs a node, at most 1h00m; pbatch, pci and pjupyter: only 112 CPUs a "
        "node, at most 1d00h)")
    assert "(pserial and pall would, but only if it is named; pdebug: at most 1h00m; " in \
        torc.why_no_partition(torc.DANE, *want(4, 2 * GB, 48 * HOURS))


# ---- planning allocations

LITTLE = {"name": "small", "num_cpus": 1, "memory": "2g", "runtime": "PT1H"}
HALF = {"name": "half", "num_cpus": 52, "memory": "100g", "runtime": "PT3H"}
GPU = {"name": "gpu", "num_cpus": 8, "memory": "20g", "num_gpus": 1, "runtime": "PT2H"}
WIDE = {"name": "wide", "num_cpus": 104, "memory": "200g", "num_nodes": 4, "runtime": "PT10H"}


def group(requirement, jobs, deferred=False):
    """A group of jobs for plan_allocations; deferred: they wait for others that are not in it."""
    [part] = torc.group_jobs([{"name": f"{requirement['name']}{i}", "resource_requirements_id": 1}
                              for i in range(jobs)], [requirement])
    return part._replace(level=1, after={(0, 2)}) if deferred else part


def planned(*groups, profile=torc.KESTREL, **options):
    """[(scheduler name, partition, nodes, walltime, allocations, jobs), ...] of a plan."""
    return [(one["scheduler"]["name"], *(one["scheduler"][name] for name in (
        "partition", "nodes", "walltime")), one["num_allocations"], len(one["jobs"]))
            for one in torc.plan_allocations(list(groups), profile, "a", **options)]


@pytest.mark.parametrize("groups, options, expected", [
    ([group(LITTLE, 1)], {}, [("small_scheduler", "shared", 1, "01:30:00", 1, 1)]),
    ([group(HALF, 9)], {}, [("half_scheduler", "standard", 1, "04:30:00", 5, 9)]),
    ([group(HALF, 9)], {"multiplier": 1.0}, [("half_scheduler", "short", 1, "03:02:00", 5, 9)]),
    ([group(HALF, 9)], {"multiplier": 3}, [("half_scheduler", "standard", 1, "09:00:00", 3, 9)]),
    ([group(HALF, 90)], {"strategy": "max-partition-time"},
     [("half_scheduler", "standard", 1, "2-00:00:00", 3, 90)]),
    ([group(HALF, 9)], {"single_allocation": True},
     [("half_scheduler", "standard", 5, "04:30:00", 1, 9)]),
    ([group(HALF, 9)], {"partition": "bigmem"},
     [("half_scheduler", "bigmem", 1, "04:30:00", 5, 9)]),
    ([group(HALF, 40)], {"partition": "bigmem", "single_allocation": True},  # 4 nodes a user
     [("half_scheduler", "bigmem", 4, "15:00:00", 1, 40)]),
    ([group(HALF, 9)], {"walltime": "06:00:00"},
     [("half_scheduler", "standard", 1, "06:00:00", 5, 9)]),
    ([group(HALF, 9)], {"walltime": "01:00:00"},               # too short
     [("half_scheduler", "short", 1, "03:00:00", 5, 9)]),
    ([group(WIDE, 3)], {}, [("wide_scheduler", "standard", 4, "15:00:00", 3, 3)]),
    ([group(WIDE, 3)], {"single_allocation": True},
     [("wide_scheduler", "standard", 12, "15:00:00", 1, 3)]),
    ([group(GPU, 9)], {}, [("gpu_scheduler", "gpu-h100s", 1, "03:00:00", 3, 9)]),
    ([group(HALF, 2, True)], {}, [("half_deferred_scheduler", "standard", 1, "04:30:00", 1, 2)]),
    ([group(HALF, 2, True)], {"prefix": "r_"},
     [("r_half_deferred_scheduler", "standard", 1, "04:30:00", 1, 2)]),
    ([group(LITTLE, 1), group({**LITTLE, "name": "tiny"}, 1)], {},
     [("shared_scheduler", "shared", 1, "01:30:00", 1, 2)]),
    ([group(LITTLE, 1), group({**LITTLE, "name": "tiny"}, 1, True)], {},
     [("small_scheduler", "shared", 1, "01:30:00", 1, 1),
      ("tiny_deferred_scheduler", "shared", 1, "01:30:00", 1, 1)]),
    ([group(HALF, 9), group({**HALF, "name": "other"}, 9)], {"by_partition": True},
     [("standard_scheduler", "standard", 1, "04:30:00", 9, 18)]),
    ([group(HALF, 9), group({**HALF, "name": "other"}, 9)], {},
     [("half_scheduler", "standard", 1, "04:30:00", 5, 9),
      ("other_scheduler", "standard", 1, "04:30:00", 5, 9)]),
    ([], {}, [])])
def test_allocations_are_planned(groups, options, expected):
    assert planned(*groups, **options) == expected


def test_a_job_as_long_as_its_partition_allows_gets_all_of_it():
    assert planned(group({**HALF, "runtime": "P10D"}, 1)) == [
        ("half_scheduler", "long", 1, "10-00:00:00", 1, 1)]


@pytest.mark.parametrize("jobs, asked", [
    (1, {"mem": "2304M", "extra": "--cpus-per-task=1"}),
    (10, {"mem": "20736M", "extra": "--cpus-per-task=10"}),
    (150, {"mem": "153856M", "extra": "--cpus-per-task=75"})])   # two allocations
def test_of_shared_nodes_only_what_the_jobs_use_is_asked_for(jobs, asked):
    scheduler = torc.plan_allocations([group(LITTLE, jobs)], torc.KESTREL, "a")[0]["scheduler"]
    assert {name: scheduler[name] for name in asked} == asked


def test_gpus_and_memory_are_asked_for():
    gpu = torc.plan_allocations([group(GPU, 3)], torc.KESTREL, "a")[0]["scheduler"]
    assert gpu == {"name": "gpu_scheduler", "account": "a", "partition": "gpu-h100s", "nodes": 1,
                   "walltime": "03:00:00", "mem": "61696M", "gres": "gpu:3",
                   "extra": "--cpus-per-task=24"}
    whole = torc.plan_allocations([group(HALF, 1)], torc.KESTREL, "a")[0]["scheduler"]
    assert whole["mem"] == "246064M" and "extra" not in whole and "gres" not in whole


def test_a_default_qos_is_asked_for():
    one = torc.KESTREL.partitions[1]._replace(default_qos="high")
    plan = torc.plan_allocations([group(HALF, 1)], torc.KESTREL._replace(partitions=(one,)), "a")
    assert plan[0]["scheduler"]["qos"] == "high"


@pytest.mark.parametrize("requirement, options, text", [
    ({**HALF, "num_cpus": 400}, {}, '2 jobs with the resource requirements "half": no partition of '
     "kestrel accepts 400 CPUs and 100.0 GB for 3h00m (short, standard, long and 6 more: "
     "only 104 CPUs a node; "),
    ({**HALF, "runtime": "PT5H"}, {"partition": "short"}, "they need 52 CPUs and 100.0 GB for "
     "5h00m; partition short: at most 4h00m"),
    (HALF, {"partition": "shorty"}, "kestrel has no partition 'shorty' (did you mean \"short\"?)"),
    (HALF, {"partition": "hbw"}, "partition hbw: at least 2 nodes")])
def test_what_cannot_be_planned_is_explained(requirement, options, text):
    with pytest.raises(torc.TorcError, match=re.escape(text)):
        torc.plan_allocations([group(requirement, 2)], torc.KESTREL, "a", **options)


def grouped(edges):
    """The plan of jobs {"name": [names it waits for]}; those with an o need another requirement."""
    names, records = list(edges), [HALF, {**HALF, "name": "other"}]
    jobs = [{"name": name, "resource_requirements_id": 1 + (name[0] == "o"),
             "depends_on_job_ids": [1 + names.index(other) for other in needs]}
            for name, needs in edges.items()]
    return [(one["trigger"], one["num_allocations"], sorted(one["jobs"]),
             sorted(one["trigger_jobs"]))
            for one in torc.plan_allocations(torc.group_jobs(jobs, records), torc.KESTREL, "a")]


def test_jobs_that_wait_for_each_other_never_share_a_trigger():
    assert grouped({"a": [], "o": ["a"], "b": ["o"], "c": ["b"]}) == [
        ("on_workflow_start", 1, ["a"], []), ("on_jobs_ready", 1, ["o"], ["o"]),
        ("on_jobs_ready", 1, ["b", "c"], ["b"])]


def test_a_chain_shares_an_allocation_that_is_long_enough():
    edges = {"a": [], "b": ["a"], "c": ["b"]}
    assert grouped(edges) == [("on_workflow_start", 1, ["a", "b", "c"], [])]
    groups = torc.group_jobs([{"name": "abc"[i], "resource_requirements_id": 1,
                               "depends_on_job_ids": [i] if i else []} for i in range(3)], [HALF])
    assert planned(*groups) == [("half_scheduler", "standard", 1, "13:30:00", 1, 3)]


def test_a_chain_longer_than_the_partition_allows_is_cut():
    groups = torc.group_jobs([{"name": str(i), "resource_requirements_id": 1,
                               "depends_on_job_ids": [i] if i else []} for i in range(20)], [HALF])
    assert planned(*groups) == [
        ("half_scheduler", "standard", 1, "2-00:00:00", 1, 16),
        ("half_deferred_scheduler", "standard", 1, "18:00:00", 1, 4)]


def test_levels_of_different_width_get_allocations_of_their_own():
    edges = {"a": [], **{f"b{i}": ["a"] for i in range(9)},
             "c": [f"b{i}" for i in range(9)]}
    assert [row[:2] for row in grouped(edges)] == [
        ("on_workflow_start", 1), ("on_jobs_ready", 5), ("on_jobs_ready", 1)]


def test_levels_follow_files_and_user_data():
    parts = torc.group_jobs([
        {"name": "a", "output_file_ids": [1], "resource_requirements_id": 1},
        {"name": "b", "input_file_ids": [1], "output_user_data_ids": [1], "resource_requirements_id": 2},
        {"name": "c", "input_user_data_ids": [1], "resource_requirements_id": 1},
        {"name": "d", "depends_on_job_ids": [1, 2], "resource_requirements_id": 1}], [LITTLE, HALF])
    assert [(part.level, part.levels, part.after) for part in parts] == [
        (0, [["a"]], set()), (1, [["b"]], {(0, 1)}), (2, [["c", "d"]], {(0, 1), (1, 2)})]
    circle = [{"name": "x", "depends_on_job_ids": [other], "resource_requirements_id": 1} for other in (2, 1)]
    with pytest.raises(torc.TorcError, match="in a circle can never run"):
        torc.group_jobs(circle, [LITTLE])


def test_jobs_without_requirements_cannot_be_planned():
    with pytest.raises(torc.TorcError, match=r"1 job has none \(a\)"):
        torc.group_jobs([{"name": "a"}], [])


def test_a_hundred_thousand_jobs_are_planned():
    jobs = [{"name": f"j{i}", "resource_requirements_id": 1 + i % 2,
             "depends_on_job_ids": [1 + i % 100] if i >= 100 else []} for i in range(100_000)]
    plan = torc.plan_allocations(torc.group_jobs(jobs, [LITTLE, HALF]), torc.KESTREL, "a")
    assert sum(len(one["jobs"]) for one in plan) == 100_000
    assert sum(one["num_allocations"] for one in plan) == 1 + 481 + 25 + 24_975


# ---- a specification with its allocations

SLURM_SPEC = """# a comment
name: sweep
slurm_defaults: {account: proj}
resource_requirements:
  - {name: small, num_cpus: 1, memory: 500m, runtime: PT10M}
  - {name: half, num_cpus: 52, memory: 100g, runtime: PT3H}
jobs:
  - {name: prep, command: 'echo "a: b"; exit 0', resource_requirements: small}
  - name: "work_{i:03d}"
    parameters: {i: "1:40"}
    depends_on: [prep]
    command: |
      echo {i}
      echo 12:30
    resource_requirements: half
  - {name: "no", command: "1e3", resource_requirements: small, depends_on_regexes: ["^work_"]}
actions:
  - {trigger_type: on_workflow_start, action_type: run_commands, commands: [date]}
"""


@pytest.fixture
def spec_file(cli, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(SLURM_SPEC)
    return path


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_generate_makes_a_specification_that_can_be_read(cli, spec_file, ending):
    out = spec_file.parent / f"out.{ending}"
    _, said, errors = cli("slurm", "generate", spec_file, "--profile", "kestrel", "-o", out, ok=0)
    assert said.startswith(f"Wrote {out}: 3 schedulers and 22 allocations on kestrel for 42 jobs")
    assert "none of the comments" in errors
    before, after = torc.read_spec(str(spec_file)), torc.read_spec(str(out))
    fields = ("name", "command", "resource_requirements_id", "depends_on_job_ids")
    assert [[job.get(name) for name in fields] for job in before.payload["jobs"]] == \
        [[job.get(name) for name in fields] for job in after.payload["jobs"]]
    names = after.summary["scheduler_names"]
    assert [names[job["scheduler_id"] - 1] for job in after.payload["jobs"]] == [
        "small_scheduler", *["half_deferred_scheduler"] * 40, "small_deferred_scheduler"]
    assert [(action["trigger_type"], action["action_type"], len(action.get("job_ids", ())))
            for action in after.payload["actions"]] == [
        ("on_workflow_start", "run_commands", 0), ("on_workflow_start", "schedule_nodes", 0),
        ("on_jobs_ready", "schedule_nodes", 40), ("on_jobs_ready", "schedule_nodes", 1)]
    assert "^work_.+$" in out.read_text() and "work_001" not in out.read_text()
    assert {record["account"] for record in after.payload["slurm_schedulers"]} == {"proj"}


def test_generate_prints_the_format_of_its_input(cli, spec_file):
    out = cli("slurm", "generate", spec_file, "--profile", "dane", "-a", "mine", ok=0)[1]
    assert out.startswith("name: sweep\n") and "account: mine" in out
    value = cli_json(cli, "slurm", "generate", spec_file, "--profile", "dane")
    assert value["name"] == "sweep" and len(value["slurm_schedulers"]) == 3
    (spec_file.parent / "in.json").write_text(json.dumps(value))
    again = cli("slurm", "generate", "in.json", "--overwrite", "--profile", "dane", ok=0)[1]
    assert json.loads(again) == value


def test_generate_refuses_what_has_allocations_and_replaces_them_if_told(cli, spec_file):
    cli("slurm", "generate", spec_file, "--profile", "kestrel", "-o", spec_file, ok=0)
    _, _, errors = cli("slurm", "generate", spec_file, "--profile", "kestrel", ok=1)
    assert "has slurm_schedulers and schedule_nodes actions already: --overwrite replaces" in errors
    out = cli("slurm", "generate", spec_file, "--profile", "dane", "--overwrite", "--no-actions",
              ok=0)[1]
    assert "pbatch" in out and "schedule_nodes" not in out and "run_commands" in out
    assert len(torc.read_spec("x.yaml", out).payload["slurm_schedulers"]) == 3


def test_jobs_of_one_name_with_different_requirements_are_bound_to_no_scheduler(cli, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({
        "name": "s", "resource_requirements": [
            {"name": "r1", "num_cpus": 104, "memory": "1g"},
            {"name": "r2", "num_cpus": 104, "memory": "500g"}],
        "jobs": [{"name": "j{i}", "parameters": {"i": "1:2"}, "command": "true",
                  "resource_requirements": "r{i}"}]}))
    _, out, errors = cli("slurm", "generate", "s.json", "-a", "x", "--profile", "kestrel", ok=0)
    assert 'the jobs of "j{i}" belong to 2 schedulers (r1_scheduler and r2_scheduler)' in errors
    assert "scheduler" not in json.loads(out)["jobs"][0]
    assert len(torc.read_spec("s.json", out).payload["actions"]) == 2


def test_a_pattern_that_would_find_other_jobs_too_is_not_used():
    document = {"jobs": [{"name": "a{i}"}, {"name": "ab{i}"}]}
    names = [[f"a{i}" for i in range(30)], [f"ab{i}" for i in range(30)]]
    assert torc.action_job_fields(names[0], document, names) == {"jobs": names[0]}
    assert torc.action_job_fields(names[1], document, names) == {"job_name_regexes": ["^ab.+$"]}


@pytest.mark.parametrize("text", ["no", "12:30", "1:5", "010", "1e3", "0o17", "~", "", "2024-01-01",
                                  "=", "<<", "a: b", "# x", "on", "1_000", ".5", "x\ny\n", " x ",
                                  "x \ny", "0x1F", "\u00e4", "null", "!x", "*x", "1."])
def test_texts_survive_in_yaml_by_either_version(text):
    import yaml
    written = torc.specification_text({"value": text, "n": [10, 1.5, True, None]}, False)
    for value in (torc.parse_yaml("x", written), yaml.safe_load(written)):
        assert value == {"value": text, "n": [10, 1.5, True, None]}


@pytest.mark.parametrize("words, text", [
    (["slurm", "generate", "no.yaml"], "no.yaml: No such file or directory"),
    (["slurm", "generate", "bare.json", "--profile", "kestrel"],
     "no account to charge: use --account NAME, or put account into slurm_defaults"),
    (["slurm", "generate", "bare.json", "-a", "x", "--profile", "kestrel"],
     "1 job has none (a)"),
    (["slurm", "generate", "spec.yaml", "--profile", "kestrl"], 'did you mean "kestrel"?'),
    (["slurm", "generate", "spec.yaml"], "this machine belongs to no known HPC system and has no "
     "Slurm (no sinfo on the PATH): name a profile (kestrel, dane)"),
    (["slurm", "generate", "spec.yaml", "--profile", "slurm"], "there is no sinfo on the PATH"),
    (["slurm", "generate", "spec.yaml", "--walltime-multiplier", "0.5"],
     "'0.5' is not a factor from 1 to 1000"),
    (["slurm", "generate", "spec.yaml", "--walltime-strategy", "max"], "max-job-runtime"),
    (["slurm", "plan-allocations", "spec.yaml", "--offline"], "--offline needs a profile"),
    (["hpc", "match", "kestrel", "--walltime", "soon"], "'soon' is not a time such as 04:00:00"),
    (["hpc", "match", "kestrel", "--gpus", "9"], "kestrel accepts 1 CPU and 9 GPUs (debug: only 2 "),
    (["hpc", "partitions", "danne"], 'did you mean "dane"?')])
def test_errors_of_planning_say_what_to_do(cli, spec_file, programs, words, text):
    programs()
    (spec_file.parent / "bare.json").write_text(
        '{"name": "x", "jobs": [{"name": "a", "command": "true"}]}')
    code, _, errors = cli(*words)
    assert code in (1, 2) and text in errors and "Traceback" not in errors


def test_the_plan_is_shown_without_a_cluster(cli, spec_file):
    rows = cli_json(cli, "slurm", "plan-allocations", spec_file, "--profile", "kestrel",
                    "--offline")["schedulers"]
    assert [(row["partition"], row["jobs"], row["num_allocations"]) for row in rows] == [
        ("shared", 1, 1), ("standard", 40, 20), ("shared", 1, 1)]
    out = cli("slurm", "plan-allocations", spec_file, "--profile", "kestrel", "--offline", ok=0)[1]
    assert "half_deferred_scheduler" in out and "Idle" not in out


def test_the_plan_asks_slurm_for_idle_nodes_and_starts(cli, spec_file, programs):
    programs(sinfo="echo 'shared*|idle|3'; echo 'shared|alloc|9'; echo 'standard|idle~|2'",
             sbatch='echo "sbatch: Job 7 to start at 2026-01-02T03:04:05 using 1 processors on '
                    'nodes c1 in partition x" >&2')
    rows = cli_json(cli, "slurm", "plan-allocations", spec_file, "--profile",
                    "kestrel")["schedulers"]
    assert [row["idle_nodes"] for row in rows] == [3, 2, 3]
    assert {row["predicted_start"] for row in rows} == {"2026-01-02 03:04:05"}
    programs(sbatch="echo 'allocation failure: Invalid account' >&2; exit 1")
    rows = cli_json(cli, "slurm", "plan-allocations", spec_file, "--profile",
                    "kestrel")["schedulers"]
    assert {row["predicted_start"] for row in rows} == {"Invalid account"}


# ---- several clusters, refused allocations

@pytest.fixture
def away(api, programs, monkeypatch):
    """A workflow with a job at work in allocation 77 of a cluster "other", seen from one that is
    called "here"; away(True) takes the controller away. Its id is away.workflow_id."""
    workflow_id, _ = make(api, {"a": []})
    make_node(api, workflow_id, compute_node_type="slurm", scheduler={
        "type": "slurm", "scheduler_id": 77, "node_index": 0, "restarts": 0, "cluster": "other"})

    def set_away(is_away):
        monkeypatch.setattr(torc, "_cluster", {**torc._cluster, "again": 0})
        lost = "echo 'Unable to contact slurm controller' >&2; exit 1"
        programs(scontrol=lost if is_away else "echo 'ClusterName = here'",
                 squeue=lost if is_away else "echo 'Invalid job id specified' >&2; exit 1", sacct=":")
    monkeypatch.setattr(torc, "_cluster", {"name": None, "again": 0})
    set_away.workflow_id = workflow_id
    return set_away


def test_a_controller_that_was_away_makes_no_allocation_of_another_cluster_ones_own(api, away):
    record = api.post("/scheduled_compute_nodes", {
        "workflow_id": away.workflow_id, "scheduler_id": 77, "scheduler_type": "slurm",
        "scheduler_config_id": 1, "status": "active", "cluster": "other"}, once=True)
    for is_away in (True, False):
        away(is_away)
        assert torc.close_ended_allocations(api, away.workflow_id, torc.Watch()) == []
        assert torc.cluster_name() == (None if is_away else "here")
    assert api.get(f"/scheduled_compute_nodes/{record['id']}")["status"] == "active"
    [node] = api.items("/compute_nodes", workflow_id=away.workflow_id)
    assert node["is_active"]


def test_a_worker_says_of_which_cluster_its_allocation_is(api, away):
    body = {"workflow_id": away.workflow_id, "scheduler_id": 77, "scheduler_type": "slurm",
            "scheduler_config_id": 1, "status": "active"}
    first = api.post("/scheduled_compute_nodes", body, once=True)
    again = api.post("/scheduled_compute_nodes", {**body, "cluster": "other"}, once=True)
    assert again == {**first, "cluster": "other"}
    assert api.post("/scheduled_compute_nodes", {**body, "cluster": "third"}, once=True)["id"] != first["id"]
    away(False)
    assert torc.close_ended_allocations(api, away.workflow_id, torc.Watch()) == []


class Fails:
    """A client whose first `method` request to a path that ends with `end` fails after `passes`."""

    is_local, host, port, tls, password, cookie, others = False, "127.0.0.1", 1, None, None, None, ()

    def __init__(self, api, method=None, end="", passes=0):
        self.api, self.method, self.end, self.left = api, method, end, passes

    def __getattr__(self, name):
        return getattr(self.api, name)

    def job_environment(self):
        return {}

    def post(self, path, body=None, **query):
        return self.judged("POST", path) or self.api.post(path, body, **query)

    def delete(self, path, **query):
        return self.judged("DELETE", path) or self.api.delete(path, **query)

    def judged(self, method, path):
        if method == self.method and path.endswith(self.end):
            self.left -= 1
            if self.left < 0:
                raise torc.Unreachable("the server does not answer")


def two_allocations(api):
    """The id of a workflow that asks for allocations of two schedulers at its start."""
    return api.post("/workflow_specs", {
        "workflow": {"name": "w", "user": "tester"}, "jobs": [{"name": "a", "command": "x"}],
        "slurm_schedulers": [{"name": name, "account": "a", "nodes": 1, "walltime": "01:00:00"}
                             for name in ("one", "two")],
        "actions": [{"trigger_type": "on_workflow_start", "action_type": "schedule_nodes",
                     "action_config": {"scheduler_id": number, "scheduler_type": "slurm",
                                       "num_allocations": 1}} for number in (1, 2)]})["id"]


SECOND_REFUSED = '[ ! -e "$0.n" ] || { echo "Invalid account" >&2; exit 1; }; : > "$0.n"; echo 100'


@pytest.mark.parametrize("method, passes, message", [
    ("POST", 1, "does not answer"), ("DELETE", 0, "Invalid account")])
def test_an_allocation_that_there_is_is_told_whatever_fails_after_it(
        api, programs, tmp_path, method, passes, message):
    programs(sbatch=SECOND_REFUSED, scontrol="echo 'ClusterName = here'")
    workflow_id = two_allocations(api)
    api.post(f"/workflows/{workflow_id}/initialize_jobs")
    request = torc.WorkerRequest(str(tmp_path), str(tmp_path), ("http://h:1",))
    with pytest.raises(torc.TorcError, match=message) as failed:
        torc.schedule_pending(Fails(api, method, "/claim", passes), workflow_id, request)
    assert failed.value.submitted == [100]


# ---- commands for profiles

SINFO = """case "$*" in
  *config*) echo "ClusterName             = blue" ;;
  *scontrol*|*partition*) echo "PartitionName=cpu State=UP OverSubscribe=EXCLUSIVE MinNodes=0" ;;
  *) echo "cpu*|64|250000|2-00:00:00|(null)|10"; echo "cpu-stdby|64|250000|infinite|(null)|10" ;;
esac"""


def test_a_generated_profile_is_found_and_wins(cli, programs, monkeypatch):
    programs(sinfo=SINFO, scontrol=SINFO)
    monkeypatch.setattr(torc, "_cluster", {"name": None, "again": 0})
    home = Path(os.environ["HOME"])
    assert "slurm (no known system, but it has Slurm" in cli("hpc", "detect", ok=0)[1]
    out = cli("hpc", "generate", "-o", home / ".torc/hpc/blue.json", "--skip-stdby", ok=0)[1]
    assert "profile blue, 1 partition, for hosts like" in out
    assert cli_json(cli, "hpc", "detect")["name"] == "blue"
    shown = cli_json(cli, "hpc", "show")
    assert shown == json.loads((home / ".torc/hpc/blue.json").read_text())
    assert [one["name"] for one in cli_json(cli, "hpc", "partitions")["partitions"]] == ["cpu"]
    (home / ".torc/hpc/k.json").write_text(json.dumps({**shown, "name": "kestrel"}))
    rows = cli_json(cli, "hpc", "list")["profiles"]
    assert [(row["name"], row["own"]) for row in rows] == [
        ("blue", True), ("kestrel", True), ("dane", False)]
    names = [one["name"] for one in cli_json(cli, "hpc", "partitions", "slurm")["partitions"]]
    assert names == ["cpu", "cpu-stdby"]


@pytest.mark.parametrize("text, fault", [
    ("{", "k.json line 1: not JSON"), ("[]", "k.json is [], not a mapping"),
    ('{"name": "x"}', "k.json: missing field `partitions`"),
    ('{"name": "x", "partitions": [{"name": "p", "cpus_per_nod": 4}]}',
     "k.json: partition \"p\": unknown field 'cpus_per_nod' (did you mean \"cpus_per_node\"?)"),
    ('{"name": "x", "partitions": [{"name": "p", "cpus_per_node": "4"}]}',
     "k.json: partition \"p\": cpus_per_node: '4' is not an integer of at least 1"),
    ('{"name": "x", "partitions": [], "detection": [{"type": "hostname", "value": "("}]}',
     "k.json: detection 1: '(' is not a valid regular expression"),
    ('{"name": "x", "partitions": [], "detection": [{"type": "env", "value": "x"}]}',
     "k.json: detection 1: the field name, of the environment variable, is missing"),
    ('{"name": "slurm", "partitions": []}', 'the name "slurm" is that of the profile')])
def test_a_wrong_profile_is_explained(cli, text, fault):
    path = Path(os.environ["HOME"]) / ".torc" / "hpc" / "k.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    _, _, errors = cli("hpc", "list", ok=1)
    assert fault in errors


def test_a_profile_that_cannot_be_read_hides_no_other(cli):
    home = Path(os.environ["HOME"]) / ".torc" / "hpc"
    home.mkdir(parents=True)
    (home / "a.json").symlink_to("nowhere")
    (home / "b.json").write_text('{"name": "blue", "partitions": []}')
    _, out, errors = cli("hpc", "list", ok=0)
    assert "blue" in out and f"torc: {home}/a.json is left out: it cannot be read" in errors


def test_match_marks_the_best_partition(cli):
    rows = cli_json(cli, "hpc", "match", "kestrel", "--cpus", "52", "--memory", "100g",
                    "--walltime", "PT6H")["partitions"]
    assert [row["name"] for row in rows if row["best"]] == ["standard"] == [rows[0]["name"]]
    rows = cli_json(cli, "hpc", "match", "dane", "--walltime", "2-00:00:00")["partitions"]
    assert [(row["name"], row["best"]) for row in rows] == [("pserial", False), ("pall", False)]


@pytest.mark.parametrize("name", ["kestrel", "dane"])
def test_a_profile_survives_its_file(cli, tmp_path, name):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(cli_json(cli, "hpc", "show", name)))
    assert torc.read_profile(str(path)) == torc.BUILT_IN_PROFILES[name]


# ==================================================================================================
# 13 Operations
# ==================================================================================================

@pytest.mark.parametrize("name", torc.OPERATIONS)
def test_every_operation_says_the_same_in_the_three_faces(name, server, tmp_path, monkeypatch, capsys):
    """Reachable in each, with the sentences of one Plan; nothing is changed by looking."""
    client, operation = server.client(), torc.OPERATIONS[name]
    workflow_id, ids = make(client, {"a": [], "b": ["a"], "c": []})
    node = make_node(client, workflow_id)
    complete(client, ids["c"], workflow_id, node, -128)
    client.put(f"/compute_nodes/{node}", {"is_active": False})
    (tmp_path / "spec.json").write_text(json.dumps({"name": "s", "jobs": [{"name": "j", "command": "true"}]}))
    monkeypatch.chdir(tmp_path)
    before = statuses(client, workflow_id)
    args = torc.parse_command(torc.COMMANDS["dash"], [], ["-o", str(tmp_path)])
    target = {"jobs": ids["a" if "_job" in name else "c"], "spec": "spec.json"}.get(operation.target, workflow_id)

    try:
        plan = torc.plan_for(name, client, target, args.output_dir)
        terminal = [plan.title, *plan.lines]
    except torc.TorcError as error:
        terminal = [str(error)]
    assert name == "export" or name in {row[1] for _, rows in torc.KEYS.values() for row in rows}
    assert re.search(rf"\b{name}: [\"\[]|/dash/{name}\b", torc.DASH_JS), name
    body = {"workflow_id": workflow_id, **({"ids": str(target)} if operation.target == "jobs" else {})}
    if operation.target != "spec":
        try:
            shown = torc.DashActions(args).do(client, name, dry_run="true", **body)
            page = [shown["title"], *shown["lines"]] if "title" in shown else [shown.get("message")]
        except torc.TorcError as error:
            page = [str(error)]
        # A reset offers one of its choices there, each with its jobs; what is sure is not asked.
        assert page in (terminal, [None]) or name == "reset", (page, terminal)
    assert operation.command in torc.COMMANDS
    if name not in ("watch", "create", "reset"):      # they have no dry run, or their own
        torc.main([*operation.command.split(), *(["true"] if name == "archive" else []), str(target),
                   *(["retry"] if name == "resolve" else []), "--dry-run", "--url", server.url])
        out, err = capsys.readouterr()
        whole = (out or err).replace(":\n  torc ", ": torc ")             # on a line of its own
        lines = [re.sub("^(torc|Dry run): ", "", line.strip()) for line in whole.splitlines()
                 if "using the server" not in line]
        assert lines == [terminal[0] if not out or "Dry run" not in out else torc.lower_first(terminal[0]),
                         *terminal[1:]]
    assert statuses(client, workflow_id) == before


# ---- edit and go on

def study(directory, first=1, last=990, name="old", **more):
    """A Spec of about 1,000 jobs: work_{i} of a range, some that stand alone, and one that gathers."""
    path = directory / "study.json"
    path.write_text(json.dumps({
        "name": "study", "parameters": {"i": f"{first}:{last}"}, **more.pop("top", {}),
        "resource_requirements": [{"name": "small", "num_cpus": 1, "memory": more.pop("memory", "1m")}],
        "jobs": [{"name": "work_{i}", "command": "true {i}", "use_parameters": ["i"]},
                 {"name": "gather", "command": "true", "use_parameters": ["i"], "depends_on": ["work_{i}"]},
                 {"name": name, "command": "true", "resource_requirements": "small"},
                 {"name": "edited", "command": "true" + more.pop("edit", "")},
                 {"name": "after", "command": "true", "depends_on": ["edited"]},
                 {"name": "last", "command": "true", "depends_on": ["after"]},
                 {"name": "same", "command": "true"}, *({"name": job, **fields} for job, fields in more.items())]}))
    return torc.read_spec(str(path))


def edited_study(directory):
    """The Spec after an edit of each sort."""
    return study(directory, 5, 994, "new", memory="2m", edit=" && true", fresh={"command": "true"},
                 bad={"command": "false"}, long={"command": "true", "priority": 1})


def made_from(client, spec):
    """The id of a new workflow of a Spec, initialized."""
    workflow_id = torc.plan_create(client, spec, None).choices[0].do(client).data["workflow_id"]
    torc.initialize_new(client, workflow_id)
    return workflow_id


def update_plan(client, workflow_id, spec):
    return torc.plan_update(client, workflow_id, torc.Wishes(specification=spec))


def attempts(client, workflow_id):
    """{job name: number of results}."""
    names = {job["id"]: job["name"] for job in client.items("/jobs", workflow_id=workflow_id)}
    found = dict.fromkeys(names.values(), 0)
    for result in client.items("/results", workflow_id=workflow_id, all_runs=True):
        found[names[result["job_id"]]] += 1
    return found


@pytest.mark.parametrize("at_work", [False, True], ids=["at its end", "while another runner works"])
def test_an_edited_specification_goes_on_as_its_dry_run_said(client, tmp_path, monkeypatch, at_work):
    monkeypatch.chdir(tmp_path)
    workflow_id = made_from(client, study(tmp_path, gone={"command": "true"}, bad={"command": "false"},
                                          long={"command": "true", "priority": 1}))
    runner = Conversation(client, workflow_id)
    [job] = runner.step(limit=1)["jobs"]
    assert job["name"] == "long"
    if not at_work:
        runner.step([runner.done(job)])
    while jobs := [job for job in runner.step(limit=300)["jobs"] if job["name"] != "long"]:
        runner.step([runner.done(job, int(job["name"] == "bad")) for job in jobs])
    before, run_id = statuses(client, workflow_id), client.get(f"/workflows/{workflow_id}/status")["run_id"]
    plan = update_plan(client, workflow_id, edited_study(tmp_path))
    added, removed = [*(f"work_{i}" for i in range(991, 995)), "new", "fresh"], [
        *(f"work_{i}" for i in range(1, 5)), "old", "gone"]
    assert {(one["kind"], one["change"], one["name"], one["fields"]) for one in plan.data["changes"]} == {
        ("resource_requirements", "changed", "small", "memory"), ("job", "changed", "edited", "command"),
        ("job", "changed", "gather", "depends_on"), *(("job", "added", name, None) for name in added),
        *(("job", "removed", name, None) for name in removed)}
    again = {job["job_name"]: job["reason"] for job in plan.data["jobs"]}
    assert again == {"edited": "its command changed", "gather": "its dependencies changed", "bad": "it did not succeed",
                     **dict.fromkeys(("after", "last"), "it depends on a job that runs again")}
    assert statuses(client, workflow_id) == before                  # by looking, nothing
    done = plan.choices[0].do(client)
    assert done.data == plan.data
    open_jobs = {name for name, status in statuses(client, workflow_id).items() if status != "completed"}
    assert open_jobs == {*again, *added, *(["long"] if at_work else [])}
    assert client.get(f"/workflows/{workflow_id}/status")["run_id"] == run_id + (not at_work)
    if at_work:
        runner.step([runner.done(job)])
    run_all(client, workflow_id, runner)
    assert set(statuses(client, workflow_id).values()) == {"completed"}
    assert attempts(client, workflow_id) == {
        name: 2 if name in again else 1 for name in statuses(client, workflow_id)}
    plan = update_plan(client, workflow_id, edited_study(tmp_path))
    assert (plan.lines, plan.data["changes"], plan.data["jobs"]) == (["Nothing has changed."], [], [])


def small_study(directory, jobs=None, **top):
    """A Spec of in.txt -> first -> mid.txt -> second, and a job beside; jobs: other fields of theirs."""
    jobs = jobs or {}
    fields = {"first": {"input_files": ["in"], "output_files": ["mid"], "output_user_data": ["made"]},
              "second": {"input_files": ["mid"]}, "beside": {"input_user_data": ["given", "made"]}}
    path = directory / "small.json"
    path.write_text(json.dumps({
        "name": "small", "files": [{"name": "in", "path": "in.txt"}, {"name": "mid", "path": "mid.txt"},
                                   {"name": "more", "path": "more.txt"}],
        "user_data": [{"name": "given", "data": 1}, {"name": "made"}],
        "resource_requirements": [{"name": "r", "num_cpus": 1, "memory": "1g"}], **top,
        "jobs": [{"name": name, "command": "true", **more, **jobs.get(name, {})} for name, more in fields.items()]}))
    return torc.read_spec(str(path))


def done_study(client, directory, **top):
    """The id of a small study whose jobs are completed."""
    for name in ("in.txt", "more.txt"):
        (directory / name).write_text("1")
    workflow_id = made_from(client, small_study(directory, **top))
    for record in client.items("/user_data", workflow_id=workflow_id, name="made"):
        client.put(f"/user_data/{record['id']}", {"data": "by a job"})
    finish_all(client, workflow_id, directory)
    return workflow_id


BELOW = "it depends on a job that runs again"


@pytest.mark.parametrize("edit, reasons", [
    ({}, {}),
    ({"touch": "in.txt"}, {"first": "its input files changed", "second": BELOW, "beside": BELOW}),
    ({"touch": "mid.txt"}, {"second": "its input files changed"}),
    ({"lose": "mid.txt"}, {"first": "its output file is missing", "second": BELOW, "beside": BELOW}),
    ({"jobs": {"second": {"input_files": ["mid", "more"]}}}, {"second": "its input files changed"}),
    ({"files": [{"name": "in", "path": "more.txt"}, {"name": "mid", "path": "mid.txt"}]},
     {"first": "its input files changed", "second": BELOW, "beside": BELOW}),
    ({"user_data": [{"name": "given", "data": 2}, {"name": "made"}]}, {"beside": "its user data changed"}),
    ({"user_data": [{"name": "given"}, {"name": "made", "data": 3}]}, {}),
    ({"jobs": {"second": {"depends_on": ["beside"]}}}, {"second": "its dependencies changed"}),
    ({"jobs": {"beside": {"invocation_script": "env"}}}, {"beside": "its command changed"}),
    ({"jobs": {"first": {"priority": 3, "resource_requirements": "r", "failure_handler": "h", "scheduler": "s",
                         "stdio": {"mode": "none"}}},
      "failure_handlers": [{"name": "h", "rules": [{"exit_codes": [1]}]}], "description": "other",
      "slurm_schedulers": [{"name": "s", "account": "a"}]}, {}),
], ids=["nothing", "input", "output", "lost output", "another input", "path", "user data", "user data of a job", "dependency",
        "script", "no outcome"])
def test_an_update_runs_again_what_its_change_concerns(client, tmp_path, monkeypatch, edit, reasons):
    monkeypatch.chdir(tmp_path)
    workflow_id, edit = done_study(client, tmp_path), dict(edit)
    for name in filter(None, [edit.pop("touch", "")]):
        touch(tmp_path / name)
    for name in filter(None, [edit.pop("lose", "")]):
        (tmp_path / name).unlink()
    plan = update_plan(client, workflow_id, small_study(tmp_path, **edit))
    assert {job["job_name"]: job["reason"] for job in plan.data["jobs"]} == reasons
    plan.choices[0].do(client)
    assert {name for name, status in statuses(client, workflow_id).items() if status != "completed"} == set(reasons)
    assert client.page("/user_data", workflow_id=workflow_id, name="made")["items"][0]["data"] == "by a job"
    finish_all(client, workflow_id, tmp_path)
    assert update_plan(client, workflow_id, small_study(tmp_path, **edit)).data["changes"] == []
    assert changed(client, workflow_id) == {}
    assert client.post("/workflows", {"name": "next", "user": "u"})["id"] == workflow_id + 1


@pytest.mark.parametrize("edit, concerned", [
    ({"jobs": {"first": {"priority": 1}}}, "first"), ({"jobs": {"second": {"command": "false"}}}, "second"),
    ({"touch": "in.txt"}, "second")], ids=["changed", "command", "downstream"])
@pytest.mark.parametrize("early", [True, False], ids=["before", "after the dry run"])
def test_an_update_leaves_jobs_alone_that_are_at_work(client, tmp_path, monkeypatch, edit, concerned, early):
    monkeypatch.chdir(tmp_path)
    workflow_id, edit = done_study(client, tmp_path), dict(edit)
    ids = {job["name"]: job["id"] for job in client.items("/jobs", workflow_id=workflow_id)}
    if edit.pop("touch", ""):
        touch(tmp_path / "in.txt")
    if early:
        rerun_and_claim(client, workflow_id, ids[concerned])
    else:
        plan = update_plan(client, workflow_id, small_study(tmp_path, **edit))
        rerun_and_claim(client, workflow_id, ids[concerned])
    before = [client.get(f"/jobs/{job_id}") for job_id in ids.values()]
    with pytest.raises(torc.Conflict, match="jobs that would change or run again are pending or running, so nothing was "
                                            f'changed: "{concerned}"; to wait until all jobs have ended: torc wait'):
        (update_plan(client, workflow_id, small_study(tmp_path, **edit)) if early else plan.choices[0].do(client))
    assert [client.get(f"/jobs/{job_id}") for job_id in ids.values()] == before


def rerun_and_claim(client, workflow_id, job_id):
    client.post(f"/jobs/{job_id}/rerun", only=True)
    assert len(client.post(f"/workflows/{workflow_id}/claim_next_jobs")["jobs"]) == 1


def test_an_update_refuses_to_remove_a_job_at_work_and_an_archived_workflow(client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workflow_id = made_from(client, study(tmp_path, 1, 2, zero={"command": "true", "priority": 1}))
    client.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=1)
    with pytest.raises(torc.Conflict, match='nothing was changed: "zero"'):
        update_plan(client, workflow_id, study(tmp_path, 1, 2))
    client.put(f"/workflows/{workflow_id}/status", {"run_id": 1, "is_canceled": False, "is_archived": True})
    with pytest.raises(torc.Invalid, match="is archived"):
        update_plan(client, workflow_id, study(tmp_path, 1, 2))


def test_an_update_keeps_equal_actions_and_what_was_done_of_them(client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def spec(last, *more):
        return small_study(tmp_path, actions=[
            commands_action("on_jobs_complete", "a", jobs=["first"]), commands_action("on_worker_start", *more),
            {"trigger_type": "on_jobs_ready", "action_type": "schedule_nodes", "jobs": ["second"], "scheduler": "s",
             "scheduler_type": "slurm"}, commands_action("on_workflow_complete", last)],
            slurm_schedulers=[{"name": "s", "account": "a"}])

    (tmp_path / "in.txt").write_text("1")
    workflow_id = made_from(client, spec("b", "c"))
    first, second, third, fourth = client.get(f"/workflows/{workflow_id}/actions")
    complete(client, third["job_ids"][0] - 1, workflow_id, make_node(client, workflow_id))
    node = make_node(client, workflow_id)
    for action in (first, second):
        client.post(f"/workflows/{workflow_id}/actions/{action['id']}/claim", {"compute_node_id": node})
    plan = update_plan(client, workflow_id, spec("d", "e"))
    assert [(one["change"], one["name"]) for one in plan.data["changes"]] == [
        ("added", "on_worker_start"), ("added", "on_workflow_complete"),
        ("removed", "on_worker_start"), ("removed", "on_workflow_complete")]
    plan.choices[0].do(client)
    now = {action["trigger_type"]: action for action in client.get(f"/workflows/{workflow_id}/actions")}
    assert now["on_jobs_complete"]["executed"] and now["on_jobs_complete"]["id"] == first["id"]
    assert now["on_jobs_ready"] == client.get(f"/workflows/{workflow_id}/actions")[1] and len(now) == 4
    assert now["on_workflow_complete"]["action_config"] == {"commands": ["d"]}
    pending = {action["trigger_type"] for action in client.get(f"/workflows/{workflow_id}/actions/pending")}
    assert "on_worker_start" in pending


def test_an_update_takes_a_canceled_workflow_up_and_keeps_what_a_recovery_raised(client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = {name: {"resource_requirements": "r"} for name in ("first", "beside")}
    workflow_id = done_study(client, tmp_path, jobs=jobs)
    ids = {job["name"]: job["id"] for job in client.items("/jobs", workflow_id=workflow_id)}
    raised = client.post("/resource_requirements", {"workflow_id": workflow_id, "name": "r_recovered1", "memory": "2g"})
    client.put(f"/jobs/{ids['beside']}", {"resource_requirements_id": raised["id"]})
    client.post(f"/jobs/{ids['beside']}/rerun")
    client.put(f"/workflows/{workflow_id}/cancel")
    done = update_plan(client, workflow_id, small_study(tmp_path, jobs=jobs)).choices[0].do(client)
    assert done.data["changes"] == [] and statuses(client, workflow_id)["beside"] == "ready"
    assert not client.get(f"/workflows/{workflow_id}/status")["is_canceled"]
    assert client.get(f"/jobs/{ids['beside']}")["resource_requirements_id"] == raised["id"]


def test_run_resumes_the_newest_workflow_of_a_file(cli, local, tmp_path):
    write_spec(tmp_path, {"good": "true", "bad": "false"})
    assert cli("run", "spec.json", "--resume")[0] == 1               # there is none yet
    code, _, err = cli("run", "spec.json")
    assert code == 1 and "torc: workflow 1 is of the same file and has not completed (1 completed, 1 failed); to go on " \
        "with it instead, add --resume\n" in err
    write_spec(tmp_path, {"good": "true", "bad": "true", "new": "true"})
    text = cli("run", "spec.json", "--resume", "--dry-run", ok=0)[1]
    assert text == ("Dry run: run workflow 2 here\n  1 job added: new\n  1 job changed: bad (command)\n"
                    "  bad (failed): its command changed\n")
    assert [job["job_name"] for job in cli_json(cli, "workflows", "update", 2, "--dry-run")["jobs"]] == ["bad"]
    err = cli("run", "spec.json", "--resume", ok=0)[2]
    assert "updated workflow 2: 1 job to run again" in err
    assert attempts(local, 2) == {"good": 1, "bad": 2, "new": 1} and attempts(local, 1) == {"good": 1, "bad": 1}
    assert "has not completed" not in cli("run", "spec.json", ok=0)[2]
    assert len(list(local.items("/workflows"))) == 3


def test_workflows_update_says_what_it_takes(cli, local, tmp_path, monkeypatch):
    make(local, {"a": []})
    write_spec(tmp_path, {"a": "true", "b": "true"})
    assert "was not made from a file; to name its specification:\n  torc workflows update 1 SPEC\n" in cli("workflows", "update", 1)[2]
    assert "mutually exclusive" in cli("workflows", "update", 1, "spec.json", "-d", "x")[2]
    cli("workflows", "update", 1, "spec.json", "--no-prompts", ok=0)
    assert statuses(local, 1) == {"a": "ready", "b": "ready"}
    assert local.get("/workflows/1")["source"] == str(tmp_path / "spec.json")
    assert "Nothing has changed." in cli("workflows", "update", 1, "--dry-run", ok=0)[1]
    (tmp_path / "spec.json").unlink()
    assert "No such file" in cli("workflows", "update", 1, "--dry-run")[2]
    monkeypatch.setattr(torc, "EXTENSIONS", ())
    write_spec(tmp_path, {"a": "true"})
    assert "lacks update_spec, which is needed here" in cli("run", "spec.json", "--resume")[2]


@pytest.mark.slow
def test_a_resumed_run_that_is_killed_goes_on_as_its_dry_run_said(tmp_path):
    database, spec = str(tmp_path / "x.db"), traced_spec(tmp_path, 30)
    assert start_run(tmp_path, spec, "--database", database).wait(60) == 0
    edited = json.loads(spec.read_text())
    edited["jobs"][0]["command"] += "; true"
    edited["jobs"].append({"name": "new", "command": "true"})
    spec.write_text(json.dumps(edited))
    client = torc.LocalClient(database)
    again = {job["job_name"] for job in update_plan(client, 1, torc.read_spec(str(spec))).data["jobs"]}
    assert again == {"j0", "j15"}
    runner = start_run(tmp_path, spec, "--database", database, "--resume")
    until(lambda: "updated workflow 1: 2 jobs" in (tmp_path / "run.log").read_text())
    runner.kill()
    runner.wait()
    until(lambda: not processes_in(tmp_path))                        # its guardian, too
    assert start_run(tmp_path, spec, "--database", database, "--resume").wait(60) == 0
    counted = attempts(client, 1)
    assert {name for name, number in counted.items() if number == 1} >= set(counted) - again - {"new"}
    assert set(statuses(client, 1).values()) == {"completed"}
    client.close()


SUBMITTED = {"name": "w", "jobs": [{"name": "a", "command": "true"}],
             "slurm_schedulers": [{"name": "s", "account": "a", "nodes": 1, "walltime": "00:10:00"}],
             "actions": [{"trigger_type": "on_workflow_start", "action_type": "schedule_nodes",
                          "scheduler": "s", "scheduler_type": "slurm", "num_allocations": 2}]}


def test_a_workflow_that_is_started_while_a_question_is_open_is_not_reset(local):
    local.post("/workflows", {"name": "w", "user": "u"})
    local.post("/jobs", {"workflow_id": 1, "name": "a", "command": "true"})
    plan, other = (torc.plan_initialize(local, 1, torc.Wishes()) for _ in range(2))
    other.choices[0].do(local)
    with pytest.raises(torc.Conflict, match="started in the meantime"):
        plan.choices[0].do(local)
    assert local.get("/workflows/1/status")["run_id"] == 1


def test_a_run_that_never_starts_leaves_no_directory(cli, tmp_path):
    (tmp_path / "bad.json").write_text('{"name": 5}')
    (tmp_path / "w.json").write_text(json.dumps({"name": "w", "files": [{"name": "f", "path": "absent"}], "jobs": [
        {"name": "a", "command": "true", "input_files": ["f"]}]}))
    assert cli("run", "bad.json")[0] == cli("run", "absent.json")[0] == 1
    code, out, err = cli("run", "w.json", "--dry-run", "-f", "json")
    assert code == 1 and json.loads(out)["dry_run"] and "input files missing" in err
    assert not (tmp_path / "torc_output").exists()


def test_a_dry_run_of_a_specification_says_its_plan_and_creates_nothing(server, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(torc, "worker_urls", lambda client, named=(): (server.url,))
    (tmp_path / "w.json").write_text(json.dumps(SUBMITTED))
    with contextlib.closing(server.client()) as client:
        spec, wishes = torc.read_spec("w.json"), torc.Wishes()
        plan = torc.plan_run(client, spec, wishes)
        _, out, _ = cli("run", "w.json", "--dry-run", "--database", "none/x.db", ok=0)
        assert out.splitlines() == ['Dry run: run workflow "w" here', *(f"  {line}" for line in plan.lines)]
        assert cli_json(cli, "run", "w.json", "--dry-run") == {**plan.data, "dry_run": True}
        plan = torc.plan_submit(client, spec, wishes)
        assert '2 allocations of scheduler "s"' in plan.lines and f"Workers reach the server at {server.url}." in plan.lines
        url = ("--url", server.url)
        assert cli("submit", "w.json", "--dry-run", *url, ok=0)[1] == plan.text + "\n"
        assert cli_json(cli, "submit", "w.json", "--dry-run", *url) == {**plan.data, "dry_run": True}
        assert not list(client.items("/workflows"))


def test_a_specification_without_its_inputs_is_submitted_only_if_that_is_said(server, cli, tmp_path, programs,
                                                                             monkeypatch):
    monkeypatch.setattr(torc, "worker_urls", lambda client, named=(): (server.url,))
    programs(sbatch="echo 'sbatch: error: Invalid account' >&2; exit 1", squeue="exit 0", scontrol="exit 0")
    jobs = [{"name": "a", "command": "true", "input_files": ["f"]}]
    (tmp_path / "w.json").write_text(json.dumps(
        {**SUBMITTED, "jobs": jobs, "files": [{"name": "f", "path": "absent"}]}))
    words = ("submit", "w.json", "--url", server.url)
    assert cli(*words, "--dry-run")[0] == 1
    code, _, err = cli(*words)
    assert code == 1 and 'input files missing: "absent"' in err and "--ignore-missing-data goes on" in err
    code, _, err = cli(*words, "-i")
    assert code == 1 and "Invalid account" in err
    assert re.search(r"No allocation was submitted, so workflow \d+ is gone again", err)
    with contextlib.closing(server.client()) as client:
        assert not list(client.items("/workflows"))


# ==================================================================================================
# 14 Server
# ==================================================================================================


def raw(server, method, path, body=None, **headers):
    """(status, headers, body text) of one HTTP request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers, text


API = torc.API_PREFIX


@pytest.mark.parametrize("method, path, body, headers, status, text", [
    ("GET", API + "/ping", None, {}, 200, '{"status":"ok"}'),
    ("HEAD", API + "/ping", None, {}, 200, ""),
    ("GET", "/", None, {}, 200, None), ("GET", "/dashboard/", None, {}, 200, None),
    ("GET", "/nowhere", None, {}, 404, ""), ("GET", API + "/ping/", None, {}, 404, ""),
    ("PATCH", API + "/workflows", None, {}, 405, ""), ("OPTIONS", API + "/ping", None, {}, 405, ""),
    ("POST", API + "/workflows", "{}", {}, 415, None),
    ("POST", API + "/workflows", "{", {"Content-Type": "application/json"}, 400, None),
    ("POST", API + "/workflows", "{}", {"Content-Type": "application/json"}, 422,
     "missing field `name`; missing field `user`"),
    ("GET", API + "/workflows?limit=100001", None, {}, 400, None),
    ("GET", API + "/jobs/9", None, {}, 404,
     '{"error":{"message":"Job not found with ID: 9","error":"NotFound"}}'),
])
def test_status_and_body_of_plain_requests(server, method, path, body, headers, status, text):
    got, answer_headers, answer = raw(server, method, path, body, **headers)
    assert got == status and (text is None or answer == text)
    assert answer_headers["X-Content-Type-Options"] == "nosniff"
    assert answer_headers["X-Frame-Options"] == "DENY" and answer_headers["X-Span-Id"]
    if status == 405:
        assert "GET" in answer_headers["Allow"]


def test_a_span_id_is_echoed(server):
    assert raw(server, "GET", API + "/ping", None, **{"X-Span-ID": "abc"})[1]["X-Span-Id"] == "abc"


def test_a_body_of_several_megabytes_is_taken_and_one_over_the_limit_refused(server):
    client = server.client()
    workflow_id, _ = make(client, {})
    jobs = [{"workflow_id": workflow_id, "name": f"{number:0200d}", "command": "c" * 300}
            for number in range(10_000)]
    assert len(client.post("/bulk_jobs", {"jobs": jobs})["jobs"]) == 10_000
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("POST", API + "/workflows")
    connection.putheader("Content-Length", str(80 * 2**20))
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_signals_end_the_server_gracefully(tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        server = Server(tmp_path / "x.db")
        waiting = threading.Thread(target=lambda: server.client().get("/ping"))
        waiting.start(), waiting.join()
        server.process.send_signal(number)
        assert server.process.wait(20) == 0
        server.process.communicate()


def test_an_answer_that_is_being_read_is_not_cut_off_by_the_end(server):
    client = server.client()
    client.post("/workflow_specs", {"workflow": {"name": "w", "user": "tester"}, "jobs": [
        {"name": f"j{number}", "command": "x" * 400} for number in range(30_000)]})
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.sock = socket.socket()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    connection.sock.connect(("127.0.0.1", server.port))
    connection.request("GET", f"{API}/jobs?workflow_id=1&limit=30000")
    answer = connection.getresponse()     # the rest waits in the server
    begun = answer.read(100_000)
    server.process.terminate()
    until(lambda: refused(server.port))
    assert len(json.loads(begun + answer.read())["items"]) == 30_000
    assert server.process.wait(20) == 0


def refused(port):
    """Whether nothing listens any more."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def test_a_waiting_client_does_not_delay_the_end(tmp_path):
    server = Server(tmp_path / "x.db")
    client = server.client()
    workflow_id, _ = make(client, {"a": []})
    since = client.get(f"/workflows/{workflow_id}/changes")["generation"]
    answers = []

    def wait():
        with contextlib.suppress(torc.Unreachable):
            answers.append(client.get(f"/workflows/{workflow_id}/changes", since=since, wait_s=60))

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: raw(server, "GET", API + "/ping")[0] == 200)
    code, _ = server.stop()
    assert code == 0
    thread.join(10)
    assert not thread.is_alive()


def test_more_waiting_clients_than_places_starve_nobody(server):
    client = server.client()
    workflow_id, _ = make(client, {"a": []})
    since = client.get(f"/workflows/{workflow_id}/changes")["generation"]
    answers = []

    def wait():
        answers.append(server.client().get(f"/workflows/{workflow_id}/changes", since=since,
                                           wait_s=50))

    threads = [threading.Thread(target=wait) for _ in range(torc.WAITING_CLIENTS + 4)]
    [thread.start() for thread in threads]
    until(lambda: sum("retry_after_s" in answer for answer in answers) == 4)
    assert client.get("/ping") == {"status": "ok"}
    client.put(f"/workflows/{workflow_id}/cancel")
    [thread.join(20) for thread in threads]
    assert sum(answer["is_canceled"] for answer in answers) == torc.WAITING_CLIENTS


def run_server(*words, cwd=None, env=None):
    """Run a server command that must end by itself: (code, stdout, stderr)."""
    done = subprocess.run([*COMMAND, "server", "run", *words], capture_output=True, text=True,
                          timeout=60, cwd=cwd, env={**os.environ, **(env or {})})
    return done.returncode, done.stdout, done.stderr


def test_a_busy_port_does_not_give_a_traceback(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        code, out, err = run_server("--port", str(port), "--database", str(tmp_path / "x.db"))
    assert code == 1 and out == ""
    assert err.splitlines()[-1] == (
        f"torc: port {port} on 127.0.0.1 is in use (pid {os.getpid()}, "
        f"{Path('/proc/self/comm').read_text().strip()}): stop it, or use --port {port + 1}, or "
        "--port 0 for any free one")


@pytest.mark.parametrize("words, message", [
    (["--host", "no-such-host.invalid"], "the host name 'no-such-host.invalid' is unknown"),
    (["--host", "192.0.2.7"], "192.0.2.7 is not an address of this machine"),
    (["--database", "missing/x.db"], "database missing/x.db: No such file or directory"),
    (["--log-dir", "file/log"], "file/log: Not a directory: name another --log-dir"),
    (["--log-level", "loud"], "invalid choice: 'loud'"),
])
def test_what_the_user_got_wrong_is_one_line(tmp_path, words, message):
    (tmp_path / "file").touch()
    code, out, err = run_server("--port", "0", *words, cwd=tmp_path)
    assert code in (1, 2) and out == "" and message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("torc: ") and "Traceback" not in err


def test_the_server_does_not_listen_everywhere_by_default(tmp_path):
    server = Server(tmp_path / "x.db")
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    listening = [row.split()[1] for row in rows if row.split()[3] == "0A"]
    assert f"0100007F:{server.port:04X}" in listening
    assert f"00000000:{server.port:04X}" not in listening


def test_an_open_server_warns_of_the_risk(tmp_path):
    server = Server(tmp_path / "x.db", 0, "--host", "0.0.0.0")
    server.client().get("/ping")          # it answers once it has said what it has to say
    _, errors = server.stop()
    assert "WARNING whoever reaches port" in errors and "--host 127.0.0.1" in errors
    server = Server(tmp_path / "x.db")
    assert "WARNING" not in server.stop()[1]


def test_without_a_database_option_the_server_takes_torc_db_here_and_says_so(tmp_path):
    process = subprocess.Popen([*COMMAND, "server", "--port", "0"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith("TORC_SERVER_PORT=")
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert out == "" and str(tmp_path / "torc.db") in err
    assert (tmp_path / "torc.db").exists()


def test_database_url_names_the_database(tmp_path):
    process = subprocess.Popen([*COMMAND, "server", "--port", "0"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env={**os.environ, "DATABASE_URL": "sqlite:named.db"})
    assert process.stdout.readline().startswith("TORC_SERVER_PORT=")
    process.terminate(), process.communicate(timeout=20)
    assert (tmp_path / "named.db").exists()


def test_closed_or_full_pipes_do_not_disturb_the_server(tmp_path):
    process = subprocess.Popen([*COMMAND, "server", "--port", "0", "--log-level", "debug",
                                "--database", str(tmp_path / "x.db")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    port = int(process.stdout.readline().split(b"=")[1])
    process.stdout.close()
    client = torc.Client(f"http://127.0.0.1:{port}")
    for _ in range(1500):                 # about 100 KB of log lines nobody reads
        client.get("/ping")
    process.stderr.close()
    assert client.get("/ping") == {"status": "ok"}
    process.terminate()
    assert process.wait(20) == 0


def test_json_logs_are_lines_of_json(tmp_path):
    server = Server(tmp_path / "x.db", 0, "--json-logs", "--log-dir", str(tmp_path / "logs"))
    _, errors = server.stop()
    for text in (errors, (tmp_path / "logs" / "torc-server.log").read_text()):
        lines = [json.loads(line) for line in text.splitlines()]
        assert lines[-1]["message"] == "stopped"


def test_what_was_acknowledged_survives_kill_9(tmp_path):
    server = Server(tmp_path / "x.db")
    workflow_id, ids = make(server.client(), {"a": [], "b": ["a"]})
    complete(server.client(), ids["a"], workflow_id, make_node(server.client(), workflow_id))
    server.kill()
    server = Server(tmp_path / "x.db")
    assert statuses(server.client(), workflow_id) == dict(a="completed", b="ready")


TORC_CLIENT_DIAMOND = """
import json, sys
import torc.openapi_client as oc
api = oc.ApiClient(oc.Configuration(host=sys.argv[1]))
workflows, jobs, files = oc.WorkflowsApi(api), oc.JobsApi(api), oc.FilesApi(api)
nodes, data, results = oc.ComputeNodesApi(api), oc.UserDataApi(api), oc.ResultsApi(api)
assert oc.SystemApi(api).get_version().api_version == "0.12.0"
w = workflows.create_workflow(oc.WorkflowModel(name="diamond", user="tester")).id
f = {n: files.create_file(oc.FileModel(workflow_id=w, name=n, path=n + ".json")).id
     for n in ("in", "f1", "f2", "out")}
value = data.create_user_data(oc.UserDataModel(workflow_id=w, name="scale", data={"x": [1, 2.5]})).id
assert data.get_user_data(value).data == {"x": [1, 2.5]}
need = oc.ResourceRequirementsApi(api).create_resource_requirements(oc.ResourceRequirementsModel(
    workflow_id=w, name="small", num_cpus=1, memory="10m", runtime="PT5M")).id
def job(name, reads, writes, **more):
    return oc.JobModel(workflow_id=w, name=name, command="true", input_file_ids=[f[n] for n in reads],
                       output_file_ids=[f[n] for n in writes], resource_requirements_id=need, **more)
made = jobs.create_jobs(oc.JobsModel(jobs=[
    job("pre", ["in"], ["f1"], input_user_data_ids=[value]), job("left", ["f1"], ["f2"], priority=2),
    job("right", ["f1"], []), job("post", ["f2"], ["out"])])).jobs
names = {j.id: j.name for j in made}
status = workflows.get_workflow_status(w)
assert status.run_id == 0 and workflows.is_workflow_uninitialized(w).is_uninitialized
status.run_id = 1
workflows.update_workflow_status(w, status)
workflows.initialize_jobs(w)
node = nodes.create_compute_node(oc.ComputeNodeModel(
    workflow_id=w, hostname="h", pid=1, start_time="2026-01-01T00:00:00Z", num_cpus=4, memory_gb=8.0,
    num_gpus=0, num_nodes=1, compute_node_type="local", is_active=True)).id
order = []
while not workflows.is_workflow_complete(w).is_complete:
    answer = workflows.claim_jobs_based_on_resources(w, 10, oc.ComputeNodesResources(
        num_cpus=4, memory_gb=8.0, num_gpus=0, num_nodes=1))
    assert answer.jobs, "nothing to claim"
    for j in answer.jobs:
        assert jobs.start_job(j.id, 1, node).status == "running"
    for j in answer.jobs:
        order.append(j.name)
        done = jobs.complete_job(j.id, "completed", 1, oc.ResultModel(
            job_id=j.id, workflow_id=w, run_id=1, attempt_id=j.attempt_id, compute_node_id=node,
            return_code=0, exec_time_minutes=0.1, completion_time="2026-01-01T00:00:00Z",
            status="completed"))
        assert done.status == "completed"
assert len(workflows.list_job_dependencies(w).items) == 3
assert workflows.list_job_ids(w).count == 4
assert {r.return_code for r in results.list_results(w).items} == {0}
assert jobs.list_jobs(w, include_relationships=True).items[3].depends_on_job_ids
assert workflows.list_required_existing_files(w).files
assert files.delete_files(w).count == 4
assert oc.EventsApi(api).create_event(oc.EventModel(workflow_id=w, timestamp=0, data={"a": 1})).id
assert workflows.delete_workflow(w).name == "diamond"
print(json.dumps(order))
"""


def outside_python(package):
    """The command line of this Python if it has a package that must not meet our module's name."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{package}') is None)"
    done = subprocess.run([PYTHON, "-c", code], cwd="/", capture_output=True)
    if done.returncode:
        if sys.version_info[:2] in ((3, 11), (3, 12), (3, 13)):
            pytest.fail("torc-client belongs to the extra `test` of this Python version")
        pytest.skip("torc-client needs Python 3.11 to 3.13")
    return PYTHON


def test_torc_client_takes_a_diamond_from_creation_to_results(server, tmp_path):
    python = outside_python("torc.openapi_client")
    done = subprocess.run([python, "-c", TORC_CLIENT_DIAMOND, server.url], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["pre", "left", "right", "post"]


def test_torc_starts_beside_torc_client(tmp_path):
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"torc {torc.VERSION} (")


# ---- a stream of events

class Stream:
    """A client of the event stream that sees every byte."""

    def __init__(self, server, workflow_id, query=""):
        self.socket = socket.create_connection(("127.0.0.1", server.port), 20)
        self.socket.sendall(f"GET {torc.API_PREFIX}/workflows/{workflow_id}/events/stream{query} "
                            "HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        self.data = b""

    def until(self, wanted=None):
        """All bytes so far, once `wanted` is among them, or all to the end of the connection."""
        while wanted is None or wanted not in self.data:
            new = self.socket.recv(65536)
            if not new:
                break
            self.data += new
        return self.data

    def begin(self):
        """Wait for the headers; returns them and forgets them."""
        head, _, self.data = self.until(b"\r\n\r\n").partition(b"\r\n\r\n")
        return head.decode() + "\r\n"


def test_a_stream_is_framed_as_upstreams(server):
    client = server.client()
    workflow_id, ids = make(client, {"a": []})
    node = make_node(client, workflow_id)
    stream = Stream(server, workflow_id)
    head = stream.begin()                 # comes before any event
    assert head.startswith("HTTP/1.1 200 OK\r\n") and "Transfer-Encoding: chunked" in head
    for line in ("Content-Type: text/event-stream", "Cache-Control: no-cache",
                 "X-Accel-Buffering: no"):
        assert f"\r\n{line}\r\n" in head
    before = time.time()
    complete(client, ids["a"], workflow_id, node, code=3)
    data = stream.until(b"\n\n\r\n")
    size, _, rest = data.partition(b"\r\n")
    text = rest[:int(size, 16)].decode()
    stamp = re.search(r'"timestamp":(\d+)', text)[1]
    assert text == (
        'event: job_failed\ndata: {"workflow_id":%d,"timestamp":%s,"event_type":"job_failed",'
        '"severity":"error","data":{"job_id":%d,"job_name":"a","status":"failed",'
        '"return_code":3}}\n\n' % (workflow_id, stamp, ids["a"]))
    assert before - 1 < int(stamp) / 1000 < time.time() + 1 and time.time() - before < 1


@pytest.mark.parametrize("level, kinds", [
    ("", ["job_started", "job_failed", "job_canceled"]), ("?level=DEBUG", [
        "job_started", "job_failed", "job_canceled"]), ("?level=nonsense", [
            "job_started", "job_failed", "job_canceled"]),
    ("?level=Warning", ["job_failed", "job_canceled"]), ("?level=error", ["job_failed"])])
def test_a_stream_shows_a_level_and_above(server, level, kinds):
    client = server.client()
    workflow_id, ids = make(client, {"a": [], "b": ["a"]})
    node = make_node(client, workflow_id)
    stream = Stream(server, workflow_id, level)
    stream.begin()
    client.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=1)
    client.put(f"/jobs/{ids['a']}/start_job/1/{node}")
    complete(client, ids["a"], workflow_id, node, code=1)
    stream.until(f"event: {kinds[-1]}\n".encode())
    assert re.findall(r"event: (\w+)", stream.data.decode()) == kinds


def test_a_stream_of_a_workflow_that_is_not_there_is_an_ordinary_error(server):
    status, headers, body = fetch(server, "GET", torc.API_PREFIX + "/workflows/9/events/stream")
    assert (status, headers["Content-Type"]) == (404, "application/json")
    assert "9" in json.loads(body)["error"]["message"]
    workflow_id, _ = make(server.client(), {"a": []})
    path = f"{torc.API_PREFIX}/workflows/{workflow_id}/events/stream"
    assert fetch(server, "HEAD", path)[::2] == (200, b"")


def test_streams_end_when_the_server_does(tmp_path):
    server = Server(tmp_path / "x.db")
    workflow_id, _ = make(server.client(), {"a": []})
    streams = [Stream(server, workflow_id) for _ in range(3)]
    for stream in streams:
        stream.begin()
    started = time.monotonic()
    assert server.stop()[0] == 0 and time.monotonic() - started < 3
    assert [stream.until() for stream in streams] == [b"0\r\n\r\n"] * 3


def test_70_streams_starve_nobody_and_places_come_back(server):
    client = server.client()
    workflow_id, _ = make(client, {"a": []})
    streams = [Stream(server, workflow_id) for _ in range(70)]
    heads = [stream.begin() for stream in streams]
    codes = [head.split()[1] for head in heads]
    assert codes.count("200") == torc.STREAMING_CLIENTS
    assert codes.count("503") == 70 - torc.STREAMING_CLIENTS
    assert all("Retry-After: 15" in head for head in heads if " 503 " in head)
    started = time.monotonic()
    assert client.get("/ping") == {"status": "ok"} and time.monotonic() - started < 1
    waited = client.get(f"/workflows/{workflow_id}/changes", since=client.get(
        f"/workflows/{workflow_id}/changes")["generation"], wait_s=1)
    assert "retry_after_s" not in waited  # runners still find a place to wait
    for stream in streams:
        stream.socket.close()
    again = until(lambda: (lambda one: one if " 200 " in one.begin() else None)(
        Stream(server, workflow_id)), what="a place")
    again.socket.close()


# ---- passwords and access control over HTTP

def every_route():
    """(method, path) of every route, with values in its path."""
    for method, path, *_ in torc.ROUTES:
        yield method, torc.API_PREFIX + place_of(path)


def fetch(server, method, path, header=None, body=None):
    """(status, headers, body) of a request without any client of ours."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {**({"Authorization": header} if header else {}),
               **({"Content-Type": "application/json"} if body is not None else {})}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, answer.headers, data


def guarded(path, passwords, *options, port=0):
    """A server with a password file."""
    return Server(path, port, "--auth-file", passwords, *options)


def test_require_auth_answers_nobody_on_any_route(tmp_path, passwords):
    server = guarded(tmp_path / "x.db", passwords, "--require-auth")
    paths = [*every_route(), ("GET", "/"), ("GET", "/dashboard"), ("GET", "/no/such/path"),
             ("PATCH", torc.API_PREFIX + "/ping")]
    for method, path in paths:
        for header in (None, "Basic !", basic("alice", "wrong"), "Bearer " + ALICE):
            if header and "YWxpY2U6" in header and path != torc.API_PREFIX + "/ping":
                continue                  # wrong passwords are answered late: one of them will do
            status, headers, body = fetch(server, method, path, header)
            assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="Torc"'), path
            assert body == b"Unauthorized" or method == "HEAD"
    good = basic("alice", ALICE)
    assert fetch(server, "GET", torc.API_PREFIX + "/ping", good)[0] == 200
    assert fetch(server, "GET", "/no/such/path", good)[0] == 404


def test_pipelined_requests_are_each_judged(tmp_path, passwords):
    server = guarded(tmp_path / "x.db", passwords, "--require-auth")
    ping = f"GET {torc.API_PREFIX}/ping HTTP/1.1\r\nHost: x\r\n"
    good = f"Authorization: {basic('alice', ALICE)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 20) as sock:
        sock.sendall(f"{ping}{good}\r\n{ping}\r\n{ping}{good}Connection: close\r\n\r\n".encode())
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200", b"401", b"200"]


def test_optional_passwords_refuse_nobody_and_name_who_is_known(tmp_path, passwords):
    server = guarded(tmp_path / "x.db", passwords)
    body = json.dumps({"name": "w", "user": "mallory"})
    path = torc.API_PREFIX + "/workflows"
    for header, user, subject in ((None, "mallory", "anonymous"), (basic("alice", ALICE), "alice", "alice"),
                                  (basic("alice", "wrong"), "mallory", "unknown")):
        status, _, data = fetch(server, "POST", path, header, body)
        made = json.loads(data)
        assert (status, made["user"]) == (200, user)
        assert fetch(server, "PUT", f"{path}/{made['id']}/cancel", header)[0] == 200
        [event] = server.client().page("/events", workflow_id=made["id"])["items"]
        assert event["data"]["user"] == subject
    with pytest.raises(torc.Unauthorized, match="refuses this password of the user alice"):
        torc.Client(server.url, "alice", "wrong").get("/ping")         # who is not told would act as nobody


@pytest.mark.parametrize("options, message", [
    (["--require-auth"], "--require-auth needs --auth-file FILE"),
    (["--enforce-access-control"], "--enforce-access-control needs --auth-file FILE"),
    (["--auth-file", "absent"], "password file absent does not exist: torc-htpasswd add --file"),
    (["--https"], "--https needs --tls-cert FILE and --tls-key FILE"),
    (["--https", "--tls-cert", "absent", "--tls-key", "absent"], "absent: No such file"),
])
def test_a_server_that_cannot_guard_itself_does_not_start(cli, options, message):
    code, out, err = cli("server", "run", "--port", "0", "--database", "x.db", *options)
    assert code in (1, 2) and message in err and out == ""
    assert not os.path.exists("x.db")


def test_reload_auth_reads_the_file_and_tells_which_lines_are_broken(tmp_path, passwords):
    path = tmp_path / "users"
    shutil.copy(passwords, path)
    server = guarded(tmp_path / "x.db", path, "--require-auth")
    client = torc.Client(server.url, "alice", ALICE)
    assert client.post("/admin/reload-auth") == {
        "message": "Auth credentials reloaded successfully", "user_count": 2}
    path.write_text("broken\n" + path.read_text().replace("bob:", "rob:"))
    with pytest.raises(torc.Internal, match="line 1: expected USER:HASH"):
        client.post("/admin/reload-auth")
    assert json.loads(fetch(server, "POST", torc.API_PREFIX + "/admin/reload-auth",
                            basic("alice", ALICE))[2])["error"]["error"] == "ReloadFailed"
    with pytest.raises(torc.Unauthorized):           # who is not in the file any more is let in no more
        torc.Client(server.url, "bob", BOB).get("/ping")
    server.stop()
    with Server(tmp_path / "y.db").closing() as server:
        answer = fetch(server, "POST", torc.API_PREFIX + "/admin/reload-auth")
        assert answer[0] == 500 and json.loads(answer[2])["error"]["error"] == "NoAuthFile"


def test_what_was_written_is_said_where_the_server_cannot_read_it_again(cli, server, tmp_path, passwords):
    shutil.copy(passwords, tmp_path / "users")
    for user, url, why in (("alice", f"http://127.0.0.1:{free_port()}", "refused"), ("bob", server.url, "--auth-file")):
        code, out, err = cli("htpasswd", "remove", user, "--file", "users", "--reload-auth", "--url", url)
        assert (code, out) == (1, "") and why in err and "does so by itself" in err, err
        assert f"Removed {user} from users, but the server was not made to read it again: " in err
        assert f"{user}:" not in (tmp_path / "users").read_text()


@pytest.fixture
def walls(tmp_path, passwords):
    """A server under access control, admin zoe; (server, {user: client})."""
    path = tmp_path / "users"
    file = torc.PasswordFile(passwords)
    file.path = str(path)
    file.set("zoe", torc.hash_password("zoe's own", 4))
    file.write()
    server = guarded(tmp_path / "walls.db", path, "--enforce-access-control", "--admin-user", "zoe")
    clients = {name: torc.Client(server.url, name, password) for name, password in (
        ("alice", ALICE), ("bob", BOB), ("zoe", "zoe's own"), (None, None))}
    yield server, clients
    server.stop()


@pytest.mark.parametrize("family, host, listen", [
    (socket.AF_INET, "127.0.0.1", "127.0.0.1"), (socket.AF_INET6, "::1", "::1"),
    (socket.AF_INET6, "127.0.0.1", "::")])
def test_the_kernel_tells_whose_the_other_end_is(family, host, listen):
    with socket.create_server((listen, 0), family=family,
                              dualstack_ipv6=listen == "::") as listener:
        with socket.create_connection((host, listener.getsockname()[1])):
            with listener.accept()[0] as sock:
                assert torc.peer_uid(sock) == os.getuid()
    assert torc.peer_uid(sock) is None


def test_a_password_that_is_wrong_is_called_so(tmp_path):
    torc.write_private(str(tmp_path / "users"), f"alice:{torc.hash_password(ALICE, 4)}\n")
    with guarded(tmp_path / "x.db", tmp_path / "users", "--require-auth").closing() as server:
        with pytest.raises(torc.Unauthorized, match="refuses this password of the user alice: is TORC"):
            torc.Client(server.url, "alice", "not hers").get("/workflows")
        with pytest.raises(torc.Unauthorized, match="requires a user name and password: set TORC_PASS"):
            torc.Client(server.url, "alice").get("/workflows")


def one_of_everything(client):
    """A workflow of a fresh server with a record of every kind, each with the id 1; (its id, {job name: id})."""
    workflow_id, ids = make(client, {"a": [], "b": ["a"]})
    node = make_node(client, workflow_id)
    samples = {"resource_requirements": {"name": "r"}, "failure_handler": {"name": "h", "rules": "[]"}}
    for kind in torc.KINDS.values():
        if "create" in kind.ops or kind.table == "scheduled_compute_node":
            client.post(kind.path, {**sample(kind), "workflow_id": workflow_id, **samples.get(kind.table, {})})
    client.post("/user_data", {"workflow_id": workflow_id, "name": "u"})
    client.post("/events", {"workflow_id": workflow_id, "data": {}})
    client.post("/results", {**sample(torc.KINDS["result"]), "workflow_id": workflow_id,
                             "job_id": ids["a"], "compute_node_id": node, "run_id": 1})
    act(client, workflow_id, "on_workflow_start")
    return workflow_id, ids


def test_what_a_job_finds_as_password_opens_its_workflow_while_it_runs_and_nothing_else(walls, tmp_path):
    server, clients = walls
    alice = clients["alice"]
    other, _ = one_of_everything(alice)
    alice.post(f"/workflows/{other}/actions/1/claim", {})    # else it is for any runner
    runner = run_spec(tmp_path, {"a": f"env -0 > env; {PYTHON} {TORC} user-data update 2 -d '7' > said 2>&1; touch begun; "
                                      "while test ! -e go; do sleep 0.05; done"},
                      user_data=[{"name": "found"}], actions=[{
                          "trigger_type": "on_workflow_start", "action_type": "run_commands",
                          "commands": ["env -0 > ../env_of_action"]}],
                      url=server.url, begun="begun",
                      env={"TORC_USERNAME": "alice", "TORC_PASSWORD": ALICE})
    found = {}
    for name in ("env", "env_of_action"):
        text = (tmp_path / name).read_bytes()
        assert ALICE.encode() not in text
        found[name] = dict(word.split("=", 1) for word in text.decode().split("\0") if "=" in word)
    token, mine = found["env"]["TORC_PASSWORD"], int(found["env"]["TORC_WORKFLOW_ID"])
    assert token.startswith("torc-job-") and found["env"]["TORC_USERNAME"] == "alice"
    assert alice.get("/user_data/2")["data"] == 7, (tmp_path / "said").read_text()      # it works inside
    with contextlib.closing(sqlite3.connect(server.database)) as connection:
        assert token not in "\n".join(connection.iterdump())
    job = torc.Client(server.url, "alice", token)
    assert [one["id"] for one in job.page("/workflows")["items"]] == [mine]
    assert [one["workflow"] for one in job.get("/named/job", name="a", user="alice")["items"]] == [f'{mine} "w" of alice']
    assert statuses(job, mine) == {"a": "running"}
    for method, path, *_ in torc.ROUTES:
        if path in ("/ping", "/version", "/server_info", "/named/<table:str>") or (
                path == "/workflows" and method == "GET"):
            continue
        query, body = valid_request(method, path)
        with pytest.raises(torc.Forbidden):
            job.request(method, place_of(path), query, body)
            pytest.fail(f"a job may {method} {path} of another workflow")
    for method, path, body in (("DELETE", f"/workflows/{mine}", None), ("PUT", f"/workflows/{mine}/cancel", None),
                               ("PUT", f"/workflows/{mine}", {"user": "bob"}),
                               ("POST", f"/workflows/{mine}/access_groups/1", None),
                               ("POST", f"/workflows/{mine}/claim_next_jobs", None)):
        with pytest.raises(torc.Forbidden, match="jobs may not do this"):
            job.request(method, path, {}, body)
    with pytest.raises(torc.Unauthorized):
        torc.Client(server.url, "bob", token).get(f"/workflows/{mine}")
    (tmp_path / "go").touch()
    assert runner.wait(60) == 0, (tmp_path / "run.log").read_text()
    for one in (token, found["env_of_action"].get("TORC_PASSWORD")):
        with pytest.raises(torc.Unauthorized if one else torc.Forbidden):
            torc.Client(server.url, "alice", one).get(f"/workflows/{mine}")


def test_who_wants_it_shares_the_password_with_jobs(walls, tmp_path):
    server, _ = walls
    spec = write_spec(tmp_path, {"a": "printf %s \"$TORC_PASSWORD\" > found"})
    runner = start_run(tmp_path, spec, "--url", server.url, "--share-password",
                       env={"TORC_USERNAME": "alice", "TORC_PASSWORD": ALICE})
    assert runner.wait(60) == 0 and (tmp_path / "found").read_text() == ALICE


def test_under_access_control_no_route_lets_a_stranger_at_a_workflow(walls):
    """Everything in alice's workflow, by bob and by nobody, on every route."""
    server, clients = walls
    alice, bob, nobody = clients["alice"], clients["bob"], clients[None]
    workflow_id, _ = one_of_everything(alice)
    before = sqlite3.connect(server.database).execute("SELECT count(*) FROM sqlite_master").fetchall()
    open_to_all = {"/ping", "/version", "/server_info"}
    for method, path, *_ in torc.ROUTES:
        if path in open_to_all or path == "/named/<table:str>" or path == "/workflows" and method == "GET":
            continue
        place, (query, body) = place_of(path), valid_request(method, path)
        for who, client in (("bob", bob), (None, nobody)):
            if who and path in ("/workflows", "/workflow_specs"):
                continue                  # a user may create what is his own
            with pytest.raises(torc.Forbidden):
                client.request(method, place, query, body)
                pytest.fail(f"{who} may {method} {path}")
    assert statuses(alice, workflow_id) == {"a": "ready", "b": "blocked"}


@pytest.mark.parametrize("path, query, body", [
    ("/jobs", "mine", {"workflow_id": "hers", "name": "x", "command": "true"}),
    ("/bulk_jobs", "mine", {"jobs": [{"workflow_id": "hers", "name": "x", "command": "true"}]}),
    ("/files", "mine", {"workflow_id": "hers", "name": "x", "path": "x"}),
])
def test_naming_a_workflow_of_ones_own_beside_does_not_open_anothers(walls, path, query, body):
    _, clients = walls
    ids = {"hers": make(clients["alice"], {"a": []})[0], "mine": make(clients["bob"], {"b": []})[0]}

    def filled(value):
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        return [filled(inner) for inner in value] if isinstance(value, list) else ids.get(value, value)

    with pytest.raises(torc.Forbidden):
        clients["bob"].request("POST", path, {"workflow_id": ids.get(query)}, filled(body))
    assert statuses(clients["alice"], ids["hers"]) == {"a": "ready"}


def test_workflows_are_listed_for_those_who_may_use_them(walls):
    _, clients = walls
    made = {name: make(clients[name], {"a": []})[0] for name in ("alice", "bob")}

    def listed(who, **query):
        return [item["id"] for item in clients[who].page("/workflows", **query)["items"]]

    assert listed("alice") == [made["alice"]] and listed("bob") == [made["bob"]]
    assert listed("bob", user="alice") == [] and listed(None) == []
    assert listed("zoe") == sorted(made.values())
    for who, found in (("alice", 1), ("bob", 1), ("zoe", 2)):     # by name, too; others' if none is hers
        assert len(clients[who].get("/named/workflow", name="test", user=who)["items"]) == found
    with pytest.raises(torc.NotFound):
        clients["bob"].get("/named/job", name=f"{made['alice']}/a", user="bob")
    with pytest.raises(torc.NotFound):
        clients["bob"].get("/named/job", name="a", user="alice", home=made["alice"])
    assert "git_hash" not in clients["bob"].get("/version")


def test_a_group_shares_a_workflow_until_the_link_is_cut(walls):
    _, clients = walls
    alice, bob, zoe = clients["alice"], clients["bob"], clients["zoe"]
    workflow_id, ids = make(alice, {"a": []})
    group = zoe.post("/access_groups", {"name": "team", "description": "d"})
    with pytest.raises(torc.Forbidden, match="alice is not an admin: ask zoe$"):
        alice.post("/access_groups", {"name": "hers"})
    assert group["name"] == "team" and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d",
                                                    group["created_at"])
    with pytest.raises(torc.Conflict, match="another access group has this name already"):
        zoe.post("/access_groups", {"name": "team"})
    members = f"/access_groups/{group['id']}/members"
    with pytest.raises(torc.Forbidden):
        bob.post(members, {"user_name": "bob", "role": "member"})
    assert "warning" not in zoe.post(members, {"user_name": "bob", "role": "member"})
    assert bob.get("/users/bob/groups")["items"] == [group]
    with pytest.raises(torc.Forbidden):
        bob.get("/users/alice/groups")
    with pytest.raises(torc.Forbidden):   # not even as an admin of his group
        bob.post(f"/workflows/{workflow_id}/access_groups/{group['id']}")
    alice.post(f"/workflows/{workflow_id}/access_groups/{group['id']}")
    with pytest.raises(torc.Conflict, match="is shared with group 2 already"):
        alice.post(f"/workflows/{workflow_id}/access_groups/{group['id']}")
    assert bob.get(f"/access_check/{workflow_id}/bob")["has_access"]
    assert statuses(bob, workflow_id) == {"a": "ready"}
    with pytest.raises(torc.Forbidden):   # but it stays alice's
        bob.put(f"/workflows/{workflow_id}", {"user": "bob"})
    listed = bob.get(f"/workflows/{workflow_id}/access_groups")
    assert set(listed) >= {"items", "offset", "limit", "total_count", "has_more"}
    alice.delete(f"/workflows/{workflow_id}/access_groups/{group['id']}")
    with pytest.raises(torc.Forbidden):
        statuses(bob, workflow_id)
    answer = bob.get(f"/access_check/{workflow_id}/bob")
    assert (answer["has_access"], answer["workflow_id"]) == (False, workflow_id)
    assert not zoe.get("/access_check/999/zoe")["has_access"]
    zoe.delete(f"/access_groups/{group['id']}/members/bob")
    with pytest.raises(torc.NotFound):
        zoe.delete(f"/access_groups/{group['id']}/members/bob")
    assert zoe.delete(f"/access_groups/{group['id']}") == group


def test_who_may_not_change_a_group_is_told_whom_to_ask_and_an_unknown_user_is_warned_about(walls, cli, monkeypatch):
    server, clients = walls
    clients["zoe"].post("/access_groups", {"name": "team"})
    monkeypatch.setenv("TORC_API_URL", server.url)
    monkeypatch.setenv("TORC_USERNAME", "zoe")
    monkeypatch.setenv("TORC_PASSWORD", "zoe's own")
    assert cli("access-groups", "add-user", 2, "alice", "-r", "admin", ok=0)[2].count("\n") == 1
    assert ("torc: the server's password file has no user 'bbo' (did you mean \"bob\"?); to undo this:\n"
            "  torc access-groups remove-user 2 bbo\n") in cli("access-groups", "add-user", 2, "bbo", ok=0)[2]
    monkeypatch.setenv("TORC_USERNAME", "alice")          # who may not list all groups
    monkeypatch.setenv("TORC_PASSWORD", ALICE)
    assert "bbo" in cli("access-groups", "list-members", "team", ok=0)[1]
    monkeypatch.setenv("TORC_USERNAME", "bob")
    monkeypatch.setenv("TORC_PASSWORD", BOB)
    assert "bob is not an admin of group 2: ask alice and zoe" in cli("access-groups", "add-user", 2, "bob")[2]
    with pytest.raises(torc.Forbidden, match="ask who runs the server"):
        clients[None].get("/access_groups")


def test_the_system_group_can_be_neither_deleted_nor_joined(client):
    assert client.get("/access_groups/1")["name"] == "admin"
    for method, path, body in (("DELETE", "/access_groups/1", None),
                               ("POST", "/access_groups/1/members",
                                {"user_name": "eve", "role": "admin"})):
        with pytest.raises(torc.Forbidden):
            client.request(method, path, {}, body)


def test_a_missing_record_is_404_also_for_strangers(walls):
    _, clients = walls
    for path in ("/workflows/99", "/jobs/99", "/files/99", "/workflows/99/status"):
        with pytest.raises(torc.NotFound):
            clients["bob"].get(path)


# ---- TLS

@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A directory with a CA (ca.pem) and certificates for localhost, for another name, and one
    that has expired: NAME.pem and NAME.key."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA",
            "-days", "3650", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    for name, names, days in (("good", "DNS:localhost,DNS:kl1.hsn.test,IP:127.0.0.1", "30"),
                              ("other", "DNS:kl9.test,DNS:www.kl9.test", "30"),
                              ("expired", "DNS:localhost,IP:127.0.0.1", "-1")):
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/CN=x")
        (folder / "ext").write_text(f"subjectAltName={names}\nbasicConstraints=CA:FALSE\n")
        when = ["-days", days] if days != "-1" else ["-not_before", "20200101000000Z",
                                                     "-not_after", "20200201000000Z"]
        command = ["x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                   "-CAcreateserial", "-out", f"{name}.pem", "-extfile", "ext"]
        try:
            openssl(*command, *when)
        except subprocess.CalledProcessError:        # before OpenSSL 3.4: the certificate authority
            (folder / "index.txt").write_text(""), (folder / "serial").write_text("09\n")
            (folder / "ca.cnf").write_text(
                "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nserial=serial\nnew_certs_dir=.\n"
                "default_md=sha256\npolicy=p\nx509_extensions=e\n[p]\ncommonName=supplied\n"
                f"[e]\nsubjectAltName={names}\n")
            openssl("ca", "-batch", "-config", "ca.cnf", "-in", f"{name}.csr", "-cert", "ca.pem",
                    "-keyfile", "ca.key", "-out", f"{name}.pem", "-startdate", "20200101000000Z",
                    "-enddate", "20200201000000Z", "-notext")
    return folder


def tls_server(path, certificates, name="good", *options):
    """A server that speaks TLS; its url is of localhost."""
    server = Server(path, 0, "--https", "--tls-cert", certificates / f"{name}.pem",
                    "--tls-key", certificates / f"{name}.key", *options)
    server.url = f"https://localhost:{server.port}{torc.API_PREFIX}"
    return server


def test_a_tls_server_serves_clients_that_know_its_ca(tmp_path, certificates, passwords):
    server = tls_server(tmp_path / "x.db", certificates, "good", "--auth-file", passwords,
                        "--require-auth")
    client = torc.Client(server.url, "alice", ALICE, {"ca_cert": str(certificates / "ca.pem")})
    workflow_id, _ = make(client, {f"j{number}": [] for number in range(2000)})
    assert len(list(client.items("/jobs", workflow_id=workflow_id))) == 2000
    assert client.get("/server_info")["auth_required"]
    big = "x" * 3_000_000
    made = client.post("/user_data", {"workflow_id": workflow_id, "name": "big", "data": big})
    assert client.get(f"/user_data/{made['id']}")["data"] == big
    client.close()
    spec = write_spec(tmp_path, {"a": f"{PYTHON} {TORC} user-data list 2"})
    runner = start_run(tmp_path, spec, "--url", server.url, "--tls-ca-cert", certificates / "ca.pem",
                       env={"TORC_USERNAME": "alice", "TORC_PASSWORD": ALICE})
    assert runner.wait(60) == 0, (tmp_path / "run.log").read_text()
    code, errors = server.stop()
    assert code == 0 and "Traceback" not in errors


@pytest.mark.parametrize("name, tls, message", [
    ("good", {}, "the issuer of its certificate is unknown here .* --tls-ca-cert FILE"),
    ("other", {"ca_cert": "ca.pem"}, "its certificate is not for localhost but for kl9.test, "
                                     "www.kl9.test"),
    ("expired", {"ca_cert": "ca.pem"}, "its certificate has expired"),
    ("good", {"ca_cert": "absent.pem"}, "absent.pem cannot be read"),
    ("other", {"insecure": True}, None),
])
def test_a_certificate_that_is_not_accepted_is_explained(tmp_path, certificates, name, tls, message):
    if "ca_cert" in tls:
        tls = {"ca_cert": str(certificates / tls["ca_cert"])}
    server = tls_server(tmp_path / "x.db", certificates, name)
    client = torc.Client(server.url, "alice", None, tls)
    if message:
        with pytest.raises(torc.TorcError, match=message):
            client.get("/ping")
    else:
        assert client.get("/ping") == {"status": "ok"}


def test_plain_http_and_tls_do_not_meet_in_silence(tmp_path, certificates, server):
    secure = tls_server(tmp_path / "x.db", certificates)
    with pytest.raises(torc.Unreachable, match="broke|TLS"):
        torc.Client(secure.url.replace("https", "http")).get("/ping")
    url = server.url.replace("http", "https")
    assert torc.probe(url, None, 0.5).state == "not HTTP"


def test_stuck_and_broken_handshakes_concern_nobody_else(tmp_path, certificates):
    server = tls_server(tmp_path / "x.db", certificates)
    stuck = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(10)]
    for number, sock in enumerate(stuck):
        sock.sendall(b"\x16\x03\x01\x02" if number % 2 else b"")      # the first bytes of a hello
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert not sock.recv(100).startswith(b"HTTP")
    client = torc.Client(server.url, tls={"ca_cert": str(certificates / "ca.pem")})
    assert client.get("/ping") == {"status": "ok"}
    assert make(client, {"a": []})[0] == 1
    for sock in stuck:
        sock.close()
    assert client.get("/ping") == {"status": "ok"}
    client.close()
    assert server.stop()[0] == 0


@pytest.mark.slow
def test_a_stream_over_tls_comes_at_once_and_ends_with_its_client(tmp_path, certificates):
    import ssl
    server = tls_server(tmp_path / "x.db", certificates)
    client = torc.Client(server.url, tls={"ca_cert": str(certificates / "ca.pem")})
    workflow_id, _ = make(client, {"a": []})
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    path = f"{torc.API_PREFIX}/workflows/{workflow_id}/events/stream"

    def follow():
        raw = socket.create_connection(("127.0.0.1", server.port), 20)
        sock = context.wrap_socket(raw, server_hostname="localhost")
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return sock, sock.recv(4096)

    streams = [follow() for _ in range(torc.STREAMING_CLIENTS)]
    assert all(b" 200 " in head for _, head in streams) and b" 503 " in follow()[1]
    make_node(client, workflow_id)
    for sock, _ in streams:
        assert b"event: compute_node_started" in sock.recv(4096)
        sock.close()
    until(lambda: b" 200 " in follow()[1], what="a place")
    client.close()
    assert server.stop()[0] == 0


def test_tls_older_than_1_2_is_refused(tmp_path, certificates):
    import ssl
    import warnings
    server = tls_server(tmp_path / "x.db", certificates)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        with pytest.raises(OSError):
            context.wrap_socket(sock)


def test_a_key_that_is_not_the_certificates_is_said(tmp_path, certificates, cli):
    code, _, err = cli("server", "run", "--port", "0", "--database", "x.db", "--https", "--tls-cert",
                       certificates / "good.pem", "--tls-key", certificates / "other.key")
    assert code == 1 and "they do not belong together" in err


def test_a_client_does_not_follow_a_note_from_https_to_http(server, monkeypatch):
    client = server.client()
    client.get("/ping")
    client.address = client.address._replace(scheme="https")
    assert not client._find_server()
    client.address = client.address._replace(scheme="http")
    assert not client._find_server()     # it is where the note says


def test_a_server_that_took_the_port_is_asked_nothing(tmp_path):
    first = Server(tmp_path / "x.db")
    client = first.client()
    workflow_id, _ = make(client, {"a": []})
    first.kill()
    os.unlink(torc.server_note(client.id))           # so that the client cannot find it again
    second = Server(tmp_path / "y.db", port=first.port)
    other, _ = make(second.client(), {"b": []})
    assert other == workflow_id
    client.close()                        # else it first learns that the old connection is gone
    with pytest.raises(torc.Unreachable, match="is another Torc server now"):
        client.put(f"/workflows/{workflow_id}/cancel")
    assert not second.client().get(f"/workflows/{workflow_id}/status")["is_canceled"]


# ---- in the background

@pytest.fixture
def background(tmp_path):
    """background(*words) -> the completed process of `torc server ...`; what it started is ended."""
    def run(*words):
        return subprocess.run([*COMMAND, "server", *map(str, words)], cwd=tmp_path, text=True,
                              capture_output=True, timeout=60)

    yield run
    run("stop")


def daemon_pid():
    """The pid in the pid file."""
    return int((Path.home() / ".torc" / "torc-server.pid").read_text().split()[0])


@pytest.mark.slow
def test_a_server_goes_to_the_background_and_is_ended_again(background, tmp_path):
    started = background("run", "--daemon", "--port", 0, "--database", "a.db")
    assert started.returncode == 0 and re.fullmatch(r"TORC_SERVER_PORT=\d+\n", started.stdout)
    assert "the server runs in the background" in started.stderr
    port, pid = int(started.stdout.split("=")[1]), daemon_pid()
    client = torc.Client(f"http://127.0.0.1:{port}", "tester")
    assert client.get("/ping") == {"status": "ok"}
    assert os.getsid(pid) == pid          # no terminal's end reaches it
    os.kill(pid, signal.SIGHUP)
    assert client.get("/ping") == {"status": "ok"}
    client.close()
    assert all(os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null" for fd in range(3))
    found = json.loads(background("status", "-f", "json").stdout)
    assert found["pid"] == pid and found["database"] == str(tmp_path / "a.db")
    again = background("run", "--daemon", "--port", 0, "--database", "b.db")
    assert again.returncode == 1 and f"runs in the background already (pid {pid}" in again.stderr
    home = Path.home() / ".torc"
    for path in [home, *home.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
    assert background("stop").returncode == 0
    assert not (home / "torc-server.pid").exists() and not list((home / "servers").iterdir())
    assert background("status").returncode == 1
    assert "no server runs in the background" in background("stop").stderr


@pytest.mark.slow
def test_torc_home_moves_what_is_kept_for_the_user(background, tmp_path, cli, monkeypatch):
    home = tmp_path / "moved"
    monkeypatch.setenv("TORC_HOME", str(home))
    assert background("run", "--daemon", "--port", 0, "--database", "a.db").returncode == 0
    assert json.loads(background("status", "-f", "json").stdout)["database"] == str(tmp_path / "a.db")
    dash = Dash(tmp_path, "--standalone", "--port", 0, "--server-host", "127.0.0.1")
    dash.enter()
    assert len(list((home / "servers").iterdir())) == 2 and dash.stop() == 0
    (home / "hpc").mkdir()
    (home / "hpc" / "blue.json").write_text('{"name": "blue", "partitions": []}')
    assert "blue" in cli("hpc", "list", ok=0)[1]
    unit = cli_json(cli, "server", "service", "install", "--user", "--dry-run")["unit"]
    assert f'Environment="TORC_HOME={home}"' in unit and f"--database {home}/torc.db" in unit
    assert torc.submission_environment(torc.Client("http://h"))["TORC_HOME"] == str(home)
    assert background("stop").returncode == 0
    assert {path.name for path in home.iterdir()} == {"servers", "logs", "dash", "hpc", "torc.db"}
    assert not list(Path.home().iterdir())


def test_what_needs_no_home_goes_on_without_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    with Server(tmp_path / "a.db").closing() as server:
        for words in (["run", "--example", "hello"], ["ping", "--url", server.url], ["hpc", "list"]):
            done = subprocess.run([*COMMAND, *words], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


MOVE = "set TORC_HOME to a directory that you can write to, or "


@pytest.mark.parametrize("words, place, advice", [
    (["server", "run", "--daemon", "--port", "0"], "/dev/null/.torc", MOVE + "name another --pid-file"),
    (["server", "run", "--daemon", "--port", "0", "--pid-file", "pid"], "/dev/null/.torc",
     "name another --log-dir"),
    (["server", "service", "install", "--user"], "/dev/null/.torc", MOVE + "name another --log-dir"),
    (["dash", "--standalone", "--port", "0"], "/dev/null/.local", MOVE + "name a --database"),
    (["dash", "--standalone", "--port", "0", "--database", "x.db"], "/dev/null/.torc",
     MOVE + "use --auth-file"),
    (["run", "--example", "hello", "-o", "/dev/null/x"], "/dev/null/x",
     "name another --output-dir or --database"),
    (["dash", "--url", "URL", "--socket", "/dev/null/x/s"], "/dev/null/x", "name another --socket")])
def test_where_a_home_is_needed_one_sentence_says_what_helps(server, tmp_path, monkeypatch, words, place,
                                                             advice):
    monkeypatch.setenv("HOME", "/dev/null")
    words = [server.url if word == "URL" else word for word in words]
    done = subprocess.run([*COMMAND, *words], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"torc: {place}: Not a directory: {advice}"


def test_a_home_on_which_nothing_can_be_written_says_what_helps(tmp_path, cli, monkeypatch):
    monkeypatch.setenv("TORC_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "/dev/null/x")
    assert cli("server", "service", "install", "--user", ok=1)[2] == (
        "torc: /dev/null/x: Not a directory: without a unit:\n  torc server run --daemon\n")
    assert cli("bundle", "/dev/null/x/torc.pyz", ok=1)[2] == (
        "torc: /dev/null/x/torc.pyz cannot be written: Not a directory\n")
    (tmp_path / "dash" / "password").mkdir(parents=True)
    with pytest.raises(torc.Unreachable, match="cannot be written: .*: set TORC_HOME to a directory"):
        torc.own_password(print)


def test_a_killed_server_in_the_background_is_followed_by_another(background):
    assert background("run", "--daemon", "--port", 0, "--database", "a.db").returncode == 0
    pid = daemon_pid()
    os.kill(pid, signal.SIGKILL)
    until(lambda: torc.process_start(pid) is None)
    assert background("run", "--daemon", "--port", 0, "--database", "a.db").returncode == 0
    assert daemon_pid() != pid


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_server_in_the_background_runs_on_when_the_clock_is_set(background, monkeypatch, seconds):
    assert background("run", "--daemon", "--port", 0, "--database", "a.db").returncode == 0
    path, clock = Path.home() / ".torc" / "torc-server.pid", time.time
    monkeypatch.setattr(time, "time", lambda: clock() + seconds)
    os.utime(path, (clock() + seconds, clock() + seconds))
    assert torc.running_server(path)["pid"] == daemon_pid()


def test_of_two_that_take_one_pid_file_one_runs(background, tmp_path):
    started = [subprocess.Popen([*COMMAND, "server", "run", "--daemon", "--port", "0", "--database", f"{name}.db"],
                                cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for name in "ab"]
    said = [process.communicate(timeout=60) for process in started]
    assert sorted(process.returncode for process in started) == [0, 1], said
    assert any("runs with" in err or "runs in the background already" in err for _, err in said), said
    assert background("stop").returncode == 0


def test_a_pid_file_of_another_host_is_not_acted_upon(background, tmp_path):
    path = tmp_path / "pid"
    path.write_text(f"{os.getpid()}\n" + json.dumps({
        **torc.identity(), "hostname": "other", "since": 1.0, "urls": ["http://other"], "database": "a.db"}))
    assert "runs on other: stop it there" in background("stop", "--pid-file", path).stderr
    assert "on other, since" in background("status", "--pid-file", path).stdout


def test_the_pid_of_a_stranger_is_left_alone(background, tmp_path):
    stranger = subprocess.Popen(["bash", "-c", "exec -a 'server run' sleep 60"])
    try:
        path = tmp_path / "pid"
        path.write_text(f"{stranger.pid}\n")
        os.utime(path, (1, 1))            # the file is older than the process
        assert "names no running process" in background("stop", "--pid-file", path).stderr
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("words, message", [
    (["--database", "/nowhere/x.db", "--port", "0"], "database /nowhere/x.db: No such file"),
    (["--require-auth", "--port", "0"], "--require-auth needs --auth-file"),
    (["--host", "no-such-host.invalid"], "the host name 'no-such-host.invalid' is unknown")])
def test_a_failure_in_the_background_is_told_in_the_foreground(background, words, message):
    done = background("run", "--daemon", *words)
    assert done.returncode == 1 and message in done.stderr and done.stdout == ""
    assert not (Path.home() / ".torc" / "torc-server.pid").exists()


def test_a_unit_of_systemd_starts_this_very_program(cli, monkeypatch):
    monkeypatch.setattr(torc, "systemctl", lambda user, *words: (None, "systemd is not running here"))
    text = cli_json(cli, "server", "service", "install", "--user", "--dry-run", "--host", "0.0.0.0",
                    "--database", "my 100% $x.db", "--admin-user", "a", "--admin-user", "b")["unit"]
    line = re.search(r"ExecStart=(.*)", text)[1]
    import shlex
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]
    assert words == [PYTHON, TORC, "server", "run", "--host", "0.0.0.0", "--database",
                     os.path.abspath("my 100% $x.db"), "--log-dir", str(Path.home() / ".torc/logs"),
                     "--admin-user", "a", "--admin-user", "b"]
    for name, value in (("DATABASE_URL", "sqlite:/srv/x.db"), ("TORC_ADMIN_USERS", "ann, bob"),
                        ("TORC_LOG_DIR", "/srv/log")):
        monkeypatch.setenv(name, value)
    text = cli_json(cli, "server", "service", "install", "--user", "--dry-run")["unit"]
    assert "--database /srv/x.db --log-dir /srv/log --admin-user ann --admin-user bob" in text
    for name in ("DATABASE_URL", "TORC_ADMIN_USERS", "TORC_LOG_DIR"):
        monkeypatch.delenv(name)
    path = Path.home() / ".config/systemd/user/torc-server.service"
    assert not path.exists()
    code, _, err = cli("server", "service", "install", "--user")
    assert code == 0 and path.exists() and "`systemctl --user enable --now torc-server.service` is to " \
        "be run where it does" in err
    assert cli("server", "service", "uninstall", "--user")[0] == 0 and not path.exists()
    code, _, err = cli("server", "service", "start", "--user")
    assert code == 1 and err.endswith("to create it:\n  torc server service install --user\n")


# ==================================================================================================
# 15 Terminal UI
# ==================================================================================================


def screen_text(state):
    """The screen as plain text."""
    lines = ["".join(text for text, _ in line).rstrip() for line in torc.draw(state)]
    return [torc.to_ascii(line) for line in lines] if state.plain else lines


class Hands:
    """Presses keys of a Terminal that has no terminal, and reads its screen."""

    def __init__(self, client, directory, size=(80, 24), plain=False):
        self.terminal = torc.Terminal(client, torc.TerminalTools(
            torc.find_attempt, torc.check_client, torc.Client, str(directory / "out")), size, plain)
        self.state = self.terminal
        self.terminal.watcher.ask = lambda *args: None     # its news come when they come
        self.propagate()

    def propagate(self):
        """Until all that is due is loaded and said."""
        def quiet():
            self.terminal.take_events()
            page = self.state.page
            due = not page.error and self.terminal.due(page, time.monotonic()) <= 0
            if due:
                self.terminal.tick()
            return not due and self.terminal.worker.idle and not self.terminal.events \
                and not page.loading and (
                    page.error or self.state.away or self.terminal.covered(page))
        until(quiet, what="a quiet terminal")

    def press(self, *keys):
        """Press keys; returns the screen."""
        for key in keys:
            self.terminal.press(key)
            self.propagate()
        return self.text()

    def type(self, text):
        """Type a text and Enter."""
        return self.press(*("Space" if letter == " " else letter for letter in text), "Enter")

    def text(self):
        """The screen; each line fits."""
        lines = screen_text(self.state)
        assert len(lines) == self.state.height
        assert all(torc.text_width(line) <= self.state.width for line in lines), lines
        return "\n".join(lines)


@pytest.fixture
def ui(client, tmp_path):
    """A function that makes Hands on the server or the database file."""
    made = []

    def begin(size=(80, 24), plain=False):
        made.append(Hands(client, tmp_path, size, plain))
        return made[-1]

    yield begin
    for hands in made:
        if client.is_local:               # the store is the test's, which goes on with it
            hands.terminal.worker.client = hands.terminal.worker.client.clone()
            hands.terminal.worker.client.interrupt = lambda: None
        hands.terminal.close()
        if client.is_local:
            client.store.closing = False


def small(client):
    """fetch (done) -> a, b (failed) -> last; returns (workflow id, {name: job id})."""
    workflow_id, ids = make(client, {"fetch": [], "align_1": ["fetch"], "align_2": ["fetch"],
                                     "merge 日本": ["align_1", "align_2"], "other": []})
    node = make_node(client, workflow_id)
    for name, code in (("fetch", 0), ("align_2", 3)):
        client.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=10)
        complete(client, ids[name], workflow_id, node, code)
    client.post("/user_data", {"workflow_id": workflow_id, "name": "seed", "data": {"x": 1}})
    client.post("/events", {"workflow_id": workflow_id, "data": {"category": "noted"}})
    client.post("/files", {"workflow_id": workflow_id, "name": "raw", "path": "raw.txt"})
    client.post("/scheduled_compute_nodes", {
        "workflow_id": workflow_id, "scheduler_id": 4711, "scheduler_config_id": 1,
        "scheduler_type": "slurm", "status": "complete"})
    client.post("/slurm_stats", {
        "workflow_id": workflow_id, "job_id": ids["fetch"], "run_id": 1, "attempt_id": 1,
        "slurm_job_id": "4711", "max_rss_bytes": 2**30})
    return workflow_id, ids


PAGE_TEXTS = (                            # keys that lead there, what is to be seen
    ("", ("torc / workflows", "test", "40 %")), ("g o", ("2 of 5 done", "Failures", "exit 3")),
    ("g j", ("fetch", "✓ completed", "align_2", "exit 3", "merge 日本", "1-5 of 5")),
    ("g d", ("├─ ", "✗ align_2", "after", "too")), ("g t", ("here", "One cell is")),
    ("g f", ("1 ✗ exit 3", "align_2")), ("g r", ("align_2", "fetch", "Return Code")),
    ("g n", ("here", "Active")), ("g s", ("4711", "complete")), ("g m", ("4711", "1.0 GB")),
    ("g i", ("raw.txt",)), ("g a", ("seed", '{"x":1}')), ("g e", ("Time", "noted")),
    ("g j Enter", ("It completed with return code 0", "Attempts", "Frees", "Command")),
    ("g j l", ("There is no file",)), ("g i Enter", ("raw.txt", "workflow_id")),
    ("g p", ("Nothing was started from here",)), ("g x", ("output directory",)),
    ("?", ("Workflows", "open the workflow", "Moving")))


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_every_page_of_the_terminal_fits_and_says_what_it_is_for(client, ui, size):
    small(client)
    hands = ui(size)
    for keys, texts in PAGE_TEXTS:
        del hands.state.pages[1:]
        screen = hands.press(*keys.split())
        assert all(text in screen for text in texts), (keys, screen)
    hands.terminal.resize(*((80, 24) if size == (200, 60) else (200, 60)))
    hands.text()
    hands.terminal.resize(50, 10)
    assert "needs 80 columns and 24 lines" in hands.text()


def test_the_allocation_in_focus_is_explained(api, tmp_path):
    small(api)
    hands = Hands(api, tmp_path)
    hands.press("g", "s")
    hands.terminal.tick()
    hands.propagate()
    assert "Slurm job 4711 has ended: no note" in hands.text()


def test_a_server_that_lacks_what_the_pages_need_is_named(api, tmp_path, monkeypatch):
    monkeypatch.setattr(torc, "EXTENSIONS", ("summary", "search"))
    text = " ".join(Hands(api, tmp_path).text().split())     # a long path breaks the line elsewhere
    assert "lacks failures, graph, include_results, which is needed here" in text


def test_a_terminal_without_utf_8_gets_ascii_glyphs(client, ui):
    small(client)
    hands = ui(plain=True)
    for keys, _ in PAGE_TEXTS:
        del hands.state.pages[1:]
        assert hands.press(*keys.split()).isascii()
    assert "x align_2" in hands.press("q", "g", "d")


def test_every_action_has_a_key_and_every_key_an_action():
    actions = {row[1].split()[0] for _, rows in torc.KEYS.values() for row in rows}
    methods = {name[3:] for name in dir(torc.Terminal) if name.startswith("do_")} | set(torc.OPERATIONS) - {"export"}
    assert actions == methods
    for title, rows in torc.KEYS.values():
        names = [name for row in rows for name in row[0].split()]
        assert len(names) == len(set(names)), title
    letters = [kind.go for kind in torc.PAGES.values() if kind.go]
    assert len(letters) == len(set(letters))


def test_wheel_and_click_move_open_and_turn_pages(api, tmp_path):
    small(api)
    hands = Hands(api, tmp_path)
    hands.press("g", "j")
    hands.terminal.wheel(3)
    assert hands.state.page.cursor == 3
    hands.terminal.click(10, 4)           # tabs are line 1, heads line 2
    assert hands.state.page.cursor == 1
    hands.terminal.click(screen_text(hands.state)[1].index("Graph") + 2, 1)
    hands.propagate()
    assert hands.state.page.name == "graph"
    hands.terminal.click(5, 3)
    hands.terminal.click(5, 3)
    hands.propagate()
    assert hands.state.page.name == "job"
    hands.terminal.click(5, 23)


@pytest.mark.parametrize("upstream", ["i", "I", "R", "x", "s", "W", "C", "d", "n", "Tab", "BackTab",
                                      "f", "/", "q", "r", "A", "a", "u", "o", "?"])
def test_the_keys_that_people_know_are_there_on_workflows(upstream):
    assert torc.action_of(torc.View("workflows"), upstream)


@pytest.mark.parametrize("client", ["local"], indirect=True)
@pytest.mark.parametrize("name", list(torc.PAGES))
def test_every_key_of_the_help_can_be_pressed_on_every_page(client, ui, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)           # where a report is written
    monkeypatch.setattr(torc, "Started", lambda *args: pytest.fail("nothing is to be started"))
    workflow_id, ids = small(client)
    hands = ui()
    job = {"id": ids["fetch"], "name": "fetch"}
    gone = types.SimpleNamespace(log="/nonexistent", running=False)
    subjects = {"job": job, "log": job, "record": job, "output": {"name": "run", "child": gone}}
    for names, _, _, _ in torc.keys_of(torc.View(name)):
        for key in names.split():
            del hands.state.pages[1:]
            if name != "workflows":
                hands.terminal.open(name, subjects.get(name))
            hands.propagate()
            hands.state.question = hands.state.prompt = None
            if key in ("x", "W"):         # these start a process at once
                hands.terminal.away = "no", 0.0, time.time() + 1000, 1
            hands.terminal.press(key)
            hands.text()
            hands.state.away = None
            hands.propagate()
            hands.press("Esc")
            assert hands.state.question is None and hands.state.prompt is None
    assert client.get(f"/workflows/{workflow_id}")["name"] == "test"


KEY_CASES = (                             # keys, name of the page then, text on it
    ("Enter", "overview", "of 5 done"), ("Enter Tab", "jobs", "fetch"),
    ("Enter BackTab", "events", "Time"), ("Enter Right Right Left", "jobs", "fetch"),
    ("Enter q", "workflows", "torc / workflows"), ("g j G", "jobs", "▌      5  other"),
    ("g j j j k", "jobs", "▌      2  align_1"), ("g j G Home", "jobs", "▌      1  fetch"),
    ("g j l q", "jobs", "fetch"), ("g j o", "jobs", "by name"), ("g f j j Enter", "job", "align_2"),
    ("g d Enter", "job", "completed"), ("g r Enter", "job", "align_2"),
    ("g o g x", "network", "output directory"), ("g z", "workflows", "test"),
    ("a", "workflows", "of all users"), ("A", "workflows", "paused"),
    ("O", "processes", "Nothing was started"), ("O q", "workflows", "test"))


@pytest.mark.parametrize("keys, name, text", KEY_CASES)
def test_keys_lead_where_they_should(api, tmp_path, keys, name, text):
    small(api)
    hands = Hands(api, tmp_path)
    screen = hands.press(*keys.split())
    assert hands.state.page.name == name and text in screen, screen


def test_requirements_that_nobody_asked_for_are_no_limits(api, tmp_path):
    past = Past(api, {"a": []})
    past.run("a")
    text = past.get("/graph")["nodes"][0]["why"]
    assert text.startswith("runs for ") and " of " not in text
    row, = api.get("/jobs", workflow_id=past.workflow_id, include_results=True)["items"]
    assert (row["requirement"], row["memory_bytes"], row["runtime_s"]) == ("default", None, None)
    assert re.search(r"Needs +1 CPU \(default\)\n", Hands(api, tmp_path, (100, 50)).press("g", "j", "Enter"))


def test_a_list_of_jobs_is_filtered_by_status_words_and_family(client, ui):
    small(client)
    hands = ui()
    hands.press("g", "j", "/")
    assert "1-2 of 2" in hands.type("align")
    hands.press("f", "Ctrl-U")
    screen = hands.type("failed")
    assert "1-1 of 1" in screen and "filter: failed" in screen
    hands.press("f", "Ctrl-U")
    assert "Nothing matches nobody" in hands.type("nobody")
    assert "1-5 of 5" in hands.press("Esc")
    hands.press("f")
    assert "1-2 of 2" in hands.type("family:align")
    hands.press("Esc", "f")
    assert "1-4 of 4" in hands.type("failed completed pending")


def answers(hands):
    """The keys of the question that is asked."""
    return [choice.key for choice in hands.state.question.plan.choices]


def test_what_changes_something_is_asked_first_and_no_is_the_default(client, ui):
    workflow_id, ids = small(client)
    hands = ui()
    before = statuses(client, workflow_id)
    for page, key, words in (("w", "C", "Cancel workflow"), ("w", "d", "Delete workflow"),
                             ("w", "v", "Recover"), ("j", "c", "has ended"),
                             ("j", "y", 'Run job 1 "fetch" again')):
        if key == "v":
            for node in client.items("/compute_nodes", workflow_id=workflow_id):
                client.put(f"/compute_nodes/{node['id']}", {"is_active": False})
        screen = hands.press("g", page, key)
        assert words in screen, screen
        if hands.state.question:
            assert "keep as it is" in screen
            hands.press("Enter")
        assert statuses(client, workflow_id) == before


def test_a_job_is_run_again_canceled_and_the_workflow_deleted(client, ui):
    workflow_id, ids = small(client)
    hands = ui()
    screen = hands.press("g", "j", "j", "j", "y", "y")
    assert '"align_2" will run again' in screen
    assert '"align_2" is canceled' in hands.press("c", "y")
    assert "Canceled workflow" in hands.press("C", "y")
    assert client.get(f"/workflows/{workflow_id}/status")["is_canceled"]
    assert "is canceled already" in hands.press("C")
    screen = hands.press("q", "d")
    assert "5 jobs and 2 results" in screen
    assert "Deleted workflow" in hands.press("y") and "You have no workflow" in hands.text()


def test_jobs_are_reset_and_initialized_from_the_terminal(client, ui, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workflow_id, ids = pipeline(client, tmp_path)
    hands = ui()
    assert "Nothing has changed" in hands.press("I")
    touch(tmp_path / "in.txt")
    screen = hands.press("I")
    assert 'first (completed): its input file "in.txt" changed' in screen
    assert "2 jobs to run" in hands.press("y")
    assert statuses(client, workflow_id)["first"] == "ready"
    screen = hands.press("i")
    assert "to run again; results of earlier runs" in screen and "in.txt" not in screen
    hands.press("y")
    finish_all(client, workflow_id, tmp_path)
    screen = hands.press("R")
    assert answers(hands) == ["a"] and "3 jobs" in screen
    assert "Reset 3 jobs" in hands.press("a")
    assert statuses(client, workflow_id)["alone"] == "ready"


def test_a_workflow_is_created_from_a_path(client, ui, tmp_path):
    hands = ui()
    (tmp_path / "spec.json").write_text(json.dumps(
        {"name": "fresh", "jobs": [{"name": "a", "command": "true"}]}))
    hands.press("n")
    assert "Created workflow" in hands.type(str(tmp_path / "spec.json"))
    assert "fresh" in hands.text()
    (tmp_path / "bad.json").write_text(json.dumps({"name": "bad", "jobs": [{"nam": "a"}]}))
    hands.press("n")
    assert "bad.json" in hands.type(str(tmp_path / "bad.json"))
    hands.press("Enter", "n")
    assert "No such file or directory" in " ".join(hands.type(str(tmp_path / "none.json")).split())


@pytest.mark.slow
def test_of_100_000_jobs_only_what_is_in_view_is_loaded(api, tmp_path):
    api.post("/workflow_specs", {
        "workflow": {"name": "sweep", "user": "tester"},
        "jobs": [{"name": f"sim_{number:06d}", "command": "true"} for number in range(100_000)]})
    hands = Hands(api, tmp_path)
    assert "100,000" in hands.press("Enter")
    page = hands.press("g", "j") and hands.state.page
    assert "1-19 of 100,000" in hands.text() and len(page.data["rows"]) <= 3 * 19
    assert "99,982-100,000 of 100,000" in hands.press("G") and "sim_099999" in hands.text()
    for _ in range(30):
        hands.press("PgUp")
    assert len(page.data["rows"]) <= 3 * 19 and "sim_099" in hands.text()
    hands.press("f")
    assert "1-10 of 10" in hands.type("sim_01234")
    assert "sim_*" in hands.press("g", "d") and "100,000 uninitialized" in hands.text()


def test_a_graph_is_drawn_as_a_tree_with_each_job_once():
    nodes = [{"id": name, "name": name} for name in "abcdef"]
    edges = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", "e"), ("x", "a"), ("f", "f")]
    drawn = torc.tree(nodes, edges)
    assert [(mark, node["id"], others) for mark, node, others in drawn] == [
        ("", "a", []), ("├─ ", "b", []), ("│  ↓ ", "d", ["c"]), ("│  ↓ ", "e", []),
        ("└─ ", "c", []), ("", "f", [])]


def test_a_long_chain_stays_in_its_column():
    nodes = [{"id": number, "name": str(number)} for number in range(500)]
    drawn = torc.tree(nodes, [(number, number + 1) for number in range(499)])
    assert len(drawn) == 500 and max(len(mark) for mark, _, _ in drawn) == 2


@pytest.mark.parametrize("counted, total, width, text", [
    ({"completed": 3, "failed": 1}, 4, 8, "██████✗✗"), ({"completed": 10_000, "failed": 1}, 10_001,
                                                        10, "█████████✗"),
    ({}, 0, 10, ""), ({name: 1 for name in torc.STATUS_STYLES}, 11, 22, None)])
def test_a_bar_is_as_wide_as_asked_and_shows_every_status(counted, total, width, text):
    spans = torc.bar(torc.State(), counted, total, width)
    assert "".join(part for part, _ in spans) == text or text is None
    assert not total or sum(len(part) for part, _ in spans) == width
    assert [style for _, style in spans] == [name for name in torc.STATUS_STYLES if counted.get(name)]


@pytest.mark.parametrize("text, shown", [
    ("a\tb", "a       b"), ("\x1b[31mred\x1b[0m", "red"), ("10 %\r50 %\r90 %", "90 %"),
    ("a\x00b\u202ec", "a b c"), ("\x1b]0;title\x07x", "x"), ("日本", "日本")])
def test_text_of_others_cannot_steer_the_terminal(text, shown):
    assert torc.printable(text) == shown


def test_a_line_is_cut_to_its_width_once():
    line = [("日本語" * 5, ""), ("more", "title"), ("and more", "")]
    for width in range(3, 45):
        fitted = torc.fit(line, width)
        assert torc.line_width(fitted) <= width
    assert torc.fit([("abcdef", ""), ("gh", "")], 5) == [("abc..", "")]
    assert torc.line_width(torc.fit([("a", "")], 9, True)) == 9


def test_a_log_is_read_as_it_grows_and_only_its_end_if_it_is_long(tmp_path, monkeypatch):
    path = tmp_path / "log"
    assert torc.read_log(str(path), None, True).size == -1
    path.write_bytes(b"one\ntw")
    stream = torc.read_log(str(path), None, True)
    assert torc.log_lines(stream) == ["one", "tw"]
    path.write_bytes(b"one\ntwo \xc3\xa4\n\xc3")
    stream = torc.read_log(str(path), stream, True)
    assert torc.log_lines(stream)[:2] == ["one", "two ä"]
    path.write_bytes(b"new\n")
    assert torc.log_lines(torc.read_log(str(path), stream, True)) == ["new"]
    monkeypatch.setattr(torc, "LOG_BYTES", 100)
    path.write_bytes(b"".join(b"line %04d\n" % number for number in range(1000)))
    stream = torc.read_log(str(path), None, True)
    assert torc.log_lines(stream)[-1] == "line 0999" and stream.start == 9900


def log_hands(api, tmp_path, text):
    """Hands at the log of a failed job that has written a text to stderr."""
    workflow_id, ids = make(api, {"a": []})
    node = make_node(api, workflow_id, output_dir=str(tmp_path))
    api.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=1)
    complete(api, ids["a"], workflow_id, node, 1)
    path = tmp_path / stdio_name(workflow_id, ids["a"], 1, 1, "e")
    path.parent.mkdir()
    path.write_text(text)
    hands = Hands(api, tmp_path)
    hands.press("g", "j", "l")
    return hands, path


def test_the_log_viewer_follows_finds_wraps_and_names_its_file(api, tmp_path):
    text = "".join(f"line {number:03d}\n" for number in range(100)) + "x" * 100 + "END\n"
    hands, path = log_hands(api, tmp_path, text)
    assert "line 099" in hands.text() and "line 000" not in hands.text()
    assert "line 000" in hands.press("g")
    assert "END" in hands.press("G", "w")
    assert "x" * 79 in hands.text()
    hands.press("/")
    screen = hands.type("line 05")
    assert "→line 050" in screen
    assert "→line 051" in hands.press("n") and "→line 050" in hands.press("N")
    assert "No further" in hands.press("N")
    assert "line 099" in hands.press("G")
    with open(path, "a") as file:
        file.write("another line\n")
    assert "another line" in hands.press("r")
    assert os.path.basename(path) in hands.press("y").replace("\n   ", "")
    assert "There is no file" in hands.press("n", "Tab")


def test_a_wrapped_log_loses_no_letter_and_no_hit(api, tmp_path):
    line = "日本語" * 30 + "needle" + "x" * 200 + "END"
    hands, _ = log_hands(api, tmp_path, line + "\n")
    hands.press("w", "/")
    screen = hands.type("needle")
    shown = "".join(part.strip(" →") for part in screen.splitlines()[2:-2])
    assert shown == line, screen


def test_a_log_opens_at_the_stream_that_has_something(api, tmp_path):
    hands, path = log_hands(api, tmp_path, "")
    path.with_suffix(".o").write_text("all is said here\n")
    hands.press("q", "l")
    assert "all is said here" in hands.text()


def test_the_cursor_passes_over_headings_and_a_key_without_a_meaning_is_told(client, ui):
    small(client)
    hands = ui()
    hands.press("Enter")
    for _ in range(30):
        hands.press("j")
        page = hands.state.page
        row = torc.page_rows(hands.state, page)[page.cursor]
        assert not torc.is_heading(row)
    assert "Z does nothing on this page" in hands.press("Z")
    assert "Enter does nothing" not in hands.press("g", "o")


def test_a_second_runner_is_started_only_after_a_question(client, ui):
    workflow_id, _ = small(client)
    hands = ui()
    screen = hands.press("x")
    assert "1 runner works on it already, on here" in " ".join(screen.split()) and hands.state.question


def test_a_server_that_is_away_leaves_the_page_with_a_dated_banner(tmp_path):
    with Server(tmp_path / "x.db").closing() as server:
        client = server.client()
        small(client)
        hands = Hands(client, tmp_path)
        hands.press("Enter")
        port = server.port
        server.kill()
        hands.terminal.press("r")
        until(lambda: hands.terminal.take_events() or hands.state.away)
        screen = hands.text()
        assert "does not answer since" in screen and "Runners continue" in screen
        assert "of 5 done" in screen and "does not answer" in hands.press("C")
        tries = []
        for _ in range(7):
            tries.append(round(hands.state.away[2] - time.time()))
            hands.state.away = (*hands.state.away[:2], 0.0, hands.state.away[3])
            hands.terminal.tick()
            until(lambda: hands.terminal.take_events() or hands.state.away[2] > 0)
        assert tries == sorted(tries) and tries[-1] >= 14
    with Server(tmp_path / "x.db", port).closing():
        hands.terminal.press("r")
        until(lambda: hands.terminal.take_events() or not hands.state.away)
        assert "answers again" in hands.text()
        hands.terminal.close()


# ---- in a terminal

class Tty:
    """torc tui in a pty of its own; pyte draws what a Linux console would show."""

    def __init__(self, words, cwd, size=(80, 24), **environment):
        pexpect, pyte = pytest.importorskip("pexpect"), pytest.importorskip("pyte")
        self.gone = pexpect.TIMEOUT, pexpect.EOF
        self.screen = pyte.Screen(*size)
        self.stream, self.shown = pyte.ByteStream(self.screen), None
        settings = {**os.environ, "TERM": "linux", "LC_ALL": "C.UTF-8", **environment}
        settings.pop("COLUMNS", None)
        settings.pop("LINES", None)
        self.process = pexpect.spawn(PYTHON, [TORC, "tui", *map(str, words)], cwd=str(cwd),
                                     dimensions=size[::-1], env=settings)
        self.process.delaybeforesend = None

    def text(self):
        """The screen now."""
        with contextlib.suppress(*self.gone):
            self.stream.feed(self.process.read_nonblocking(2**16, 0.02))
            self.shown = None
        if self.shown is None:
            self.shown = "\n".join(line.rstrip() for line in self.screen.display)
        return self.shown

    def see(self, *patterns, seconds=20, then=""):
        """Wait until all patterns are on the screen, and send `then`; returns the screen."""
        found = []

        def there():
            found[:] = [self.text()]
            return all(re.search(pattern, found[0], re.M) for pattern in patterns)

        try:
            until(there, seconds)
        except AssertionError:
            raise AssertionError(f"{patterns} not on the screen:\n{found[0]}") from None
        self.send(then)
        return found[0]

    def quiet(self):
        """The screen when nothing more is drawn and nothing is under way."""
        before = None
        while True:
            text = self.text()
            if text == before and not re.search(r"^ (Looking|At work|loading).*\.\.\.$", text, re.M):
                return text
            before = text

    def send(self, keys):
        self.process.send(keys)

    def resize(self, width, height):
        self.screen.resize(height, width)
        self.shown = None
        self.process.setwinsize(height, width)

    def sane(self):
        """Whether the terminal echoes and waits for whole lines."""
        import termios
        flags = termios.tcgetattr(self.process.child_fd)[3]
        return bool(flags & termios.ICANON) and bool(flags & termios.ECHO)

    def end(self):
        """Wait for the end; returns the exit code."""
        def over():
            self.text()
            return not self.process.isalive()
        until(over, what="the end of torc tui")
        return self.process.exitstatus


@pytest.fixture
def tty(tmp_path):
    """tty(*words, size=, **environment) starts torc tui in tmp_path."""
    made = []

    def start(*words, **settings):
        made.append(Tty(words, tmp_path, **settings))
        return made[-1]

    yield start
    for one in made:
        one.process.close(force=True)


@pytest.fixture(params=["local", "http"])
def place(request, tmp_path):
    """(client, options of torc tui) for a database file and for a server."""
    if request.param == "local":
        client = torc.LocalClient(str(tmp_path / "ui.db"))
        yield client, ["--database", str(tmp_path / "ui.db")]
    else:
        server = request.getfixturevalue("server")
        client = server.client()
        yield client, ["--url", server.url]
    client.close()


CODES = {"Enter": "\r", "Tab": "\t", "BackTab": "\x1b[Z", "Esc": "\x1b", "Down": "\x1b[B",
         "Up": "\x1b[A", "Right": "\x1b[C", "Left": "\x1b[D", "PgDn": "\x1b[6~", "PgUp": "\x1b[5~",
         "Home": "\x1b[1~", "End": "\x1b[4~", "Space": " ", "Ctrl-L": "\x0c"}


@pytest.mark.slow
def test_every_key_of_the_help_works_in_a_real_terminal(place, tty):
    client, options = place
    size = (80, 24) if client.is_local else (200, 60)
    workflow_id, ids = small(client)
    screen = tty(*options, size=size)
    screen.see("40 %")
    for name, keys, see in (("workflows", "", "40 %"), ("jobs", "gj", "merge"),
                            ("job", "gj\r", "Attempts"), ("log", "gjl", "no file")):
        for names, action, _, _ in torc.keys_of(torc.View(name)):
            if action in ("suspend", "run", "watch", "back", "submit"):
                continue
            for key in names.split():
                screen.send(keys[:2])
                if keys[2:]:
                    screen.see("merge", then=keys[2:])
                screen.see(see, then=CODES.get(key, key))
                screen.quiet()
                while not re.match(" torc / workflows(  | of)", screen.quiet()):
                    screen.send("\x1b")  # out of what was opened, asked or typed
    screen.send("\x1b")
    assert client.get(f"/workflows/{workflow_id}")["name"] == "test"
    screen.send("q")
    assert screen.end() == 0 and screen.sane()


def test_a_terminal_that_is_resized_is_drawn_anew(place, tty):
    client, options = place
    small(client)
    screen = tty(*options)
    screen.see("40 %", then="gj")
    screen.see("merge")
    screen.resize(160, 50)
    screen.see("Command", "true", "Host")
    screen.resize(60, 20)
    screen.see("needs 80 columns and 24 lines; this terminal has 60")
    screen.resize(80, 24)
    screen.see("merge", "q back", then="qq")
    assert screen.end() == 0


@pytest.mark.parametrize("number, code", [("TERM", 143), ("INT", 130), ("HUP", 129)])
def test_a_signal_leaves_the_terminal_as_it_was(tty, tmp_path, number, code):
    with contextlib.closing(torc.LocalClient(str(tmp_path / "a.db"))) as client:
        small(client)
    screen = tty("--database", "a.db")
    screen.see("40 %")
    assert not screen.sane()
    screen.process.kill(getattr(signal, "SIG" + number))
    assert screen.end() == code and screen.sane()


def test_an_unexpected_error_leaves_the_terminal_as_it_was(tty, tmp_path):
    (tmp_path / "broken.py").write_text(
        "import sys\nsys.path.insert(0, sys.argv.pop(1))\nimport torc\n"
        "torc.Terminal.do_help = lambda self: 1 / 0\nsys.exit(torc.main())\n")
    screen = tty()
    screen.process.close(force=True)
    pexpect = pytest.importorskip("pexpect")
    screen.process = pexpect.spawn(PYTHON, ["broken.py", str(ROOT), "tui"], cwd=str(tmp_path),
                                   dimensions=(24, 80), env={**os.environ, "TERM": "linux"})
    screen.screen.reset()
    screen.see("no workflow", then="?")
    screen.see("ZeroDivisionError")
    assert screen.end() == 1 and screen.sane()


def test_control_z_gives_the_shell_back_and_fg_returns(tmp_path, tty):
    pexpect = pytest.importorskip("pexpect")
    screen = tty()
    screen.process.close(force=True)
    screen.process = pexpect.spawn("bash", ["--norc", "-i"], cwd=str(tmp_path), dimensions=(
        24, 80), env={**os.environ, "TERM": "linux", "LC_ALL": "C.UTF-8", "PS1": "shell> "})
    screen.screen.reset()
    screen.see("shell>", then=f"{PYTHON} {TORC} tui\n")
    screen.see("no workflow", "torc / workflows", then="\x1a")
    screen.see("Stopped")
    screen.send("stty -a | tr ' ;' '\\n\\n' | grep -x -e icanon -e echo | tr '\\n' +\n")
    screen.see(r"icanon\+echo\+", then="fg\n")
    screen.see("torc / workflows", "q back", then="q")
    screen.send("echo code $?\n")
    screen.see("code 0")


@pytest.mark.parametrize("environment", [
    {"NO_COLOR": "1"}, {"TERM": "vt100"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_no_colour_and_no_utf_8_still_tell_every_status(tty, tmp_path, environment):
    with contextlib.closing(torc.LocalClient(str(tmp_path / "a.db"))) as client:
        small(client)
    screen = tty("--database", "a.db", **environment)
    screen.see("40 %", then="gj")
    screen.see("x failed" if "LC_ALL" in environment else "✗ failed")
    if "LC_ALL" not in environment:
        colours = {cell.fg for row in screen.screen.buffer.values() for cell in row.values()}
        assert colours == {"default"}
    screen.send("qq")
    assert screen.end() == 0


@pytest.mark.parametrize("term", ["dumb", "", "no-such-terminal"])
def test_a_terminal_that_cannot_be_drawn_on_is_one_sentence(tty, term):
    screen = tty(TERM=term)
    screen.see(r"torc: torc tui cannot draw on a terminal of type")
    assert screen.end() == 1 and screen.sane()


@pytest.mark.parametrize("term", ["xterm-kitty", "no-such-terminal"])
def test_a_terminal_unknown_here_is_drawn_on_if_it_answers_like_xterm(tty, term):
    screen = tty(TERM=term)
    screen.screen.write_process_input = screen.send      # what it answers
    screen.see("no workflow", then="?")
    screen.see("Moving", then="\x1b")
    screen.see("no workflow", then="q")
    assert screen.end() == 0 and screen.sane()


def test_without_a_terminal_there_is_one_sentence_and_exit_code_1(cli):
    code, out, err = cli("tui")
    assert (code, out) == (1, "") and "needs a terminal" in err and err.count("\n") == 1


def running_job(client, tmp_path, command):
    """(workflow id, job id, runner) of a job that a runner is running."""
    made = client.post("/workflow_specs", {
        "workflow": {"name": "long", "user": "tester"},
        "jobs": [{"name": "slow", "command": command}]})
    where = ["--database", client.path] if client.is_local else ["--url", client.where]
    runner = subprocess.Popen([*COMMAND, *where, "run", str(made["id"]), "-o", "out"],
                              cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    job_id = client.page("/jobs", workflow_id=made["id"])["items"][0]["id"]
    until(lambda: client.get(f"/jobs/{job_id}")["status"] == "running", what="a running job")
    return made["id"], job_id, runner


@pytest.mark.slow
def test_the_log_of_a_running_job_is_followed_and_canceling_it_ends_its_process(
        place, tty, tmp_path):
    client, options = place
    marker = tmp_path / "pid"
    workflow_id, job_id, runner = running_job(
        client, tmp_path, f"echo $$ > {marker}; for i in $(seq 1000); do echo line $i;"
        f" [ -e {tmp_path}/go ] || while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; done; "
        "sleep 600")
    try:
        screen = tty(*options)
        screen.see("running", then="gjl")
        screen.see("line 1$", "follows")
        (tmp_path / "go").write_text("")
        screen.see("line 1000", then="q")
        screen.see("slow", "running", then="c")
        screen.see("SIGTERM", "keep as it is", then="y")
        screen.see('"slow" is canceled')
        pid = int(marker.read_text())
        until(lambda: not os.path.exists(f"/proc/{pid}"), what="the end of the process")
        screen.send("qq")
        assert screen.end() == 0
    finally:
        runner.terminate()
        runner.wait()


@pytest.mark.slow
def test_a_workflow_is_run_from_the_terminal_and_its_runner_asked_about_at_the_end(place, tty):
    client, options = place
    workflow_id = client.post("/workflow_specs", {
        "workflow": {"name": "mine", "user": "tester"},
        "jobs": [{"name": "slow", "command": "echo hello; sleep 600"}]})["id"]
    screen = tty(*options)
    screen.see("mine", then="x")
    screen.see("Started run of workflow", "running", then="O")
    screen.see("run of workflow", "pid", then="\r")
    screen.see("torc: running workflow", then="qqq")
    screen.see("Leave torc", "keep as it is", then="n")
    screen.see("Nothing was changed", then="q")
    screen.see("Leave torc", then="e")
    assert screen.end() == 0
    until(lambda: statuses(client, workflow_id)["slow"] == "ready", what="a job given back")


def test_a_server_of_its_own_ends_with_the_terminal(tty, tmp_path):
    screen = tty("--standalone", "--port", "0", "--database", "own.db")
    port = int(re.search(r"127\.0\.0\.1:(\d+)", screen.see("no workflow", r"127\.0\.0\.1:\d+"))[1])
    assert torc.probe(torc.make_url("http", "127.0.0.1", port)).state == "ok"
    screen.send("q")
    assert screen.end() == 0
    assert torc.probe(torc.make_url("http", "127.0.0.1", port)).state == "refused"


def test_a_port_that_is_taken_is_one_sentence(tty, server):
    screen = tty("--standalone", "--port", server.port)
    screen.see(r"torc: the server did not start: port \d+", "is in use")
    assert screen.end() == 1


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_is_noticed(tty, tmp_path):
    with Server(tmp_path / "x.db").closing() as server:
        small(server.client())
        port = server.port
        screen = tty("--url", server.url)
        screen.see("40 %", then="\r")
        screen.see("2 of 5 done", "live")
        server.kill()
        screen.see("does not answer since", "2 of 5 done", "away")
    with Server(tmp_path / "x.db", port).closing() as server:
        screen.see("answers again", "live", seconds=40)
        client = server.client()
        client.put("/workflows/1/cancel")
        screen.see("canceled", then="qq")
        assert screen.end() == 0


# ==================================================================================================
# 16 Command line
# ==================================================================================================


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(*words) -> (exit code, stdout, stderr), run in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torc, "listeners", lambda port: [])

    def run(*words, ok=None):
        capsys.readouterr()
        code = torc.main([str(word) for word in words])
        captured = capsys.readouterr()
        if ok is not None:
            assert code == ok, captured.err
        return code, captured.out, captured.err

    return run


def test_lists_of_groups_have_pages_and_names_of_any_letters(cli, server):
    with contextlib.closing(server.client()) as client:
        for name in ("a", "b", "c"):
            group = client.post("/access_groups", {"name": name})
        client.post(f"/access_groups/{group['id']}/members", {"user_name": "y z%20?", "role": "member"})

    def names(*words):
        _, out, _ = cli(*words, "--url", server.url, "-f", "json", ok=0)
        return [group["name"] for group in json.loads(out)["groups"]]

    everything = names("access-groups", "list")
    assert names("access-groups", "list", "-l", "2", "-o", "1") == everything[1:3]
    assert names("access-groups", "list-user-groups", "y z%20?") == ["c"]
    cli("access-groups", "remove-user", group["id"], "y z%20?", "--url", server.url, ok=0)
    assert names("access-groups", "list-user-groups", "y z%20?") == []
    assert "use --force" in cli("access-groups", "delete", "a", "b", "--url", server.url)[2]
    cli("access-groups", "delete", "a", "b", "--force", "--url", server.url, ok=0)
    assert names("access-groups", "list")[-1] == "c" and len(everything) - 2 == len(names("access-groups", "list"))


@pytest.fixture
def local(cli, tmp_path):
    """A client of the database file that cli's commands find when nothing else is named."""
    client = torc.connect(database=str(tmp_path / "torc_output" / "torc.db"))
    yield client
    check_store(client.store)
    client.close()


def cli_json(cli, *words, ok=0):
    """The JSON that a command prints."""
    return json.loads(cli("-f", "json", *words, ok=ok)[1])


def pipeline(client, directory, start=True):
    """in.txt -> first -> mid.txt -> second -> out.txt, and a job beside; all completed.

    Returns (workflow id, {job name: id}).
    """
    names = ["in.txt", "mid.txt", "out.txt"]
    payload = {"workflow": {"name": "pipeline", "user": client.user},
               "files": [{"name": name, "path": name} for name in names],
               "jobs": [{"name": "first", "command": "true", "input_file_ids": [1],
                         "output_file_ids": [2]},
                        {"name": "second", "command": "true", "input_file_ids": [2],
                         "output_file_ids": [3]},
                        {"name": "alone", "command": "true"}]}
    workflow_id = client.post("/workflow_specs", payload)["id"]
    ids = {job["name"]: job["id"] for job in client.items("/jobs", workflow_id=workflow_id)}
    if start:
        (directory / "in.txt").write_text("1")
        torc.initialize_new(client, workflow_id)
        finish_all(client, workflow_id, directory)
    return workflow_id, ids


def finish_all(client, workflow_id, directory):
    """Run what is ready, writing outputs and their times as a runner does."""
    node = make_node(client, workflow_id)
    run_id = client.get(f"/workflows/{workflow_id}/status")["run_id"]
    while True:
        jobs = client.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=10)["jobs"]
        if not jobs:
            break
        for job in jobs:
            for file_id in job.get("output_file_ids", ()):
                path = directory / client.get(f"/files/{file_id}")["path"]
                path.write_text("x")
                client.put(f"/files/{file_id}", {"st_mtime": path.stat().st_mtime})
            complete(client, job["id"], workflow_id, node, run_id=run_id,
                     attempt=job["attempt_id"])
    client.put(f"/compute_nodes/{node}", {"is_active": False})


def touch(path):
    """Give a file another time."""
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 5))


# ---- framework

@pytest.mark.parametrize("name", sorted(torc.COMMANDS))
def test_every_command_has_help_that_ends_with_an_example_of_it(cli, name):
    _, out, err = cli(*name.split(), "--help", ok=0)
    assert err == ""
    title, example = out.rstrip().splitlines()[-2:]
    assert title == "Example:" and f"torc {name}" in example


@pytest.mark.parametrize("name", sorted(torc.COMMANDS))
def test_the_example_of_every_command_can_be_parsed(name):
    import shlex
    words = shlex.split(re.split(r" && | > |[()]", torc.COMMANDS[name].example.replace(
        "source <(", ""))[0])[1:]
    head, found, rest = torc.find_command(words)
    assert found == name or name == "server"
    torc.parse_command(torc.COMMANDS[found], head, rest)


@pytest.mark.parametrize("line", ["run w.json", "submit w.json", "watch 1", "recover 1", "slurm regenerate 1",
                                  "slurm-job-runner http://h 1 out", "slurm schedule-nodes 1 -j prefix"])
def test_j_is_how_many_jobs_run_at_a_time(line):
    short = ["-m"] if "schedule-nodes" in line else ["-j"] if line[:3] == "run" else ["-j", "-m"]
    for flag in (*short, "--max-parallel-jobs"):
        head, found, rest = torc.find_command([*line.split(), flag, "3"])
        assert torc.parse_command(torc.COMMANDS[found], head, rest).max_parallel_jobs == 3


def test_torc_alone_prints_grouped_help_that_names_every_command(cli):
    _, out, _ = cli(ok=0)
    for name in torc.COMMANDS:
        assert re.search(rf"^  {re.escape(name.split()[0])} ", out, re.M), name
    assert cli("--help", ok=0)[1] == out == cli("help", ok=0)[1]


def test_a_branch_alone_is_a_usage_error_and_with_help_is_not(cli):
    code, out, err = cli("jobs")
    assert (code, out) == (2, "") and "jobs list" in err
    assert "jobs list" in cli("jobs", "--help", ok=0)[1]
    assert cli("help", "jobs", "list", ok=0)[1] == cli("jobs", "list", "-h", ok=0)[1]


def test_the_help_of_the_server_names_the_commands_below_it(cli):
    out = cli("server", "--help", ok=0)[1]
    for name in ("run", "stop", "status", "service install"):
        assert re.search(rf"^  server {name} +[A-Z]", out, re.M), name


def test_version_names_the_hash_of_the_text_and_the_api(cli):
    digest = hashlib.sha256(SOURCE.encode()).hexdigest()[:12]
    assert cli("--version", ok=0)[1] == f"torc 0.1.0 ({digest}, speaks Torc API 0.12.0)\n"
    assert cli("jobs", "list", "-V", ok=0)[1].startswith("torc 0.1.0")


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["run", "--help"]])
def test_version_and_help_import_neither_http_nor_ssl_nor_sqlite(words):
    code = ("import sys; sys.argv = ['torc', *sys.argv[1:]]; import torc; torc.main();"
            "print([name for name in ('http.client', 'ssl', 'sqlite3', 'bottle', 'yaml')"
            " if name in sys.modules])")
    out = subprocess.run([PYTHON, "-c", code, *words], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_the_doctor_tells_each_trouble_with_its_remedy(cli, tmp_path, passwords):
    server = guarded(tmp_path / "x.db", passwords, "--require-auth")
    code, out, _ = cli("doctor", "--url", server.url, "-f", "json")
    verdicts = {check["check"].split()[0]: check for check in json.loads(out)["checks"]}
    assert code == 1 and verdicts["credentials"]["verdict"] == "fail"
    assert "set TORC_PASSWORD" in verdicts["credentials"]["next_step"]
    server.stop()
    code, out, _ = cli("doctor", "--url", server.url)
    assert code == 1 and "refused" in out and "no program listens there" in out
    assert cli("doctor")[0] == 1
    with Server(tmp_path / "y.db").closing() as server:
        code, out, _ = cli("doctor", "--url", server.url)
        assert code == 0 and re.search(r"clocks +ok +\d s apart", out), out


@pytest.mark.parametrize("words", ["-f", "jobs list --status", "--url"])
def test_an_option_without_its_value_is_a_usage_error(cli, words):
    assert cli(*words.split())[0] == 2


@pytest.mark.parametrize("words", [
    "-f json workflows list", "workflows list -f json", "workflows -f json list",
    "workflows list --format=json", "--format=json workflows list", "workflows list -fjson"])
def test_global_options_are_not_refused_behind_the_command(cli, local, words):
    assert json.loads(cli(*words.split(), ok=0)[1]) == {"workflows": []}


@pytest.mark.parametrize("words, values", [
    ("--url http://h -f json --log-level debug server --port 1",
     {"url": "http://h", "format": "json", "log_level": "debug", "port": 1}),
    ("server -d mine.db -l warn",
     {"database": "mine.db", "log_level": "warn", "host": "127.0.0.1"}),
    ("jobs list --status failed 3 -l 5", {"workflow_id": "3", "status": "failed", "limit": 5}),
], ids=["later_default_undoes_nothing", "own_short_option_wins_behind", "id_behind_options"])
def test_options_have_their_values_wherever_they_stand(words, values):
    head, name, rest = torc.find_command(words.split())
    args = torc.parse_command(torc.COMMANDS[name], head, rest)
    assert {name: getattr(args, name) for name in values} == values


@pytest.mark.parametrize("words, hint", [
    ("jbos list", 'did you mean "jobs"?'), ("jobs lst", 'did you mean "list"?'),
    ("jobs list --statsu failed", 'did you mean "--status"?'),
    ("--frmat json jobs list", 'did you mean "--format"?'),
    ("run --exmaple hello", 'did you mean "--example"?'),
    ("jobs list --status faild 1", "invalid choice"),
    ("jobs get", "required"), ("-f xml ping", "invalid choice"), ("jobs list 1 2", "2"),
    ("run --time-limit 5m x.json", "ISO 8601"), ("run --end-time noon x.json", "not a time"),
    ("plot-resources x", "not in this version"),
    ("user-data create 1 -n a -d {", "is not JSON"), ("run", "name a specification file"),
    ("--database a --url http://b ping", "mutually exclusive"),
    ("resource-requirements create 1 -n x -m 1.5g", "memory '1.5g'"), ("-x", "unknown option -x"),
    ("run 1 --example hello", "mutually exclusive")])
def test_a_wrong_command_line_is_one_line_and_exit_code_2(cli, words, hint):
    code, out, err = cli(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith("torc: ") and hint in err and err.count("\n") == 1


def test_an_error_is_json_on_stdout_too_when_json_is_wanted(cli, local):
    code, out, err = cli("jobs", "get", "99", "-f", "json")
    assert code == 1
    error = json.loads(out)["error"]
    assert error["error"] == "NotFound" and "99" in error["message"]
    assert error["message"] in err


def test_a_missing_database_is_an_error_that_says_what_makes_one(cli):
    code, _, err = cli("workflows", "list")
    assert code == 1 and "torc run SPEC" in err and not os.path.exists("torc_output")


def test_an_unexpected_file_is_no_traceback(cli, tmp_path):
    (tmp_path / "bad.db").write_text("no database, but long enough to look at" * 100)
    code, _, err = cli("--database", "bad.db", "workflows", "list")
    assert code == 1 and "bad.db" in err and "Traceback" not in err


def test_a_password_in_the_arguments_is_warned_about(cli, local):
    assert "visible" in cli("--password", "secret", "ping")[2]


@pytest.mark.parametrize("words, said", [
    (["ping", "--prompt-password"], "torc: no password was typed (without a terminal, set TORC_PASSWORD)\n"),
    (["htpasswd", "hash"], "torc: there is no password on standard input\n")])
def test_a_password_that_cannot_be_asked_for_is_a_sentence(words, said, tmp_path):
    done = subprocess.run([*COMMAND, *words, "--url", "http://localhost:1"], cwd=tmp_path, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, start_new_session=True)
    assert (done.returncode, done.stderr) == (2, said)


def test_ctrl_d_at_a_password_is_a_sentence(cli, monkeypatch):
    def end_of_file(*_):
        raise EOFError

    monkeypatch.setattr("getpass.getpass", end_of_file)
    assert cli("ping", "--prompt-password")[::2] == (
        2, "torc: no password was typed (without a terminal, set TORC_PASSWORD)\n")


def test_inside_a_job_a_command_does_not_say_what_it_uses(cli, local, monkeypatch):
    assert "using the local database" in cli("ping", ok=0)[2]
    monkeypatch.setenv("TORC_JOB_ID", "1")
    assert cli("ping", ok=0)[2] == ""
    assert "99" in cli("jobs", "get", 99)[2]


@pytest.mark.parametrize("text, seconds", [
    ("1970-01-01T00:01:00Z", 60), ("1970-01-01T01:00:00.5+01:00", 0.5),
    ("1970-01-01 00:00:00.123456789z", 0.123)])
def test_a_time_is_read_with_zone_and_fraction(text, seconds):
    assert torc.parse_local_time(text) == pytest.approx(seconds)


# ---- output

def test_a_table_is_aligned_and_numbers_stand_to_the_right():
    assert torc.table_lines(["ID", "Name"], [["1", "a"], ["10", "long name"]]) == [
        "ID  Name", "--  ---------", " 1  a", "10  long name"]


def test_a_terminal_gets_rules_and_cells_that_fit(monkeypatch):
    class Terminal:
        encoding = "utf-8"

        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "30")
    lines = torc.table_lines(["ID", "Name"], [["1", "x" * 100]])
    monkeypatch.undo()
    assert "\u2502" in lines[0] and "\u253c" in lines[1] and lines[2].endswith("x..")
    assert all(len(line) <= 30 for line in lines)


def test_a_cell_cannot_steer_the_terminal():
    assert torc.cell({"name": "a\x1b[2J\nb"}, "name") == "a [2J b"


def test_an_empty_list_is_a_sentence_and_exit_code_0(cli, local):
    workflow_id, _ = make(local, {}, start=False)
    assert cli("jobs", "list", workflow_id, ok=0)[1] == "No jobs found for workflow 1.\n"
    assert cli_json(cli, "jobs", "list", workflow_id) == {"jobs": []}


def test_a_list_has_heading_columns_and_total(cli, local):
    make(local, {"a": [], "b": ["a"]})
    lines = cli("jobs", "list", 1, "-x", "command", ok=0)[1].splitlines()
    assert lines[0] == "Jobs for workflow 1:" and lines[-1] == "Total: 2 jobs"
    assert lines[1].split() == ["ID", "Name", "Status", "Attempt", "Priority"]
    assert lines[3].split() == ["1", "a", "ready", "1", "0"]


def test_long_json_lists_are_one_record_a_line(cli, local):
    make(local, {f"j{number}": [] for number in range(1001)}, start=False)
    out = cli("-f", "json", "jobs", "list", 1, ok=0)[1]
    assert len(json.loads(out)["jobs"]) == 1001 and out.count("\n") == 1003


def csv_rows(text):
    """The records of CSV (RFC 4180), each as a dict."""
    assert text.endswith("\r\n")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_csv_is_the_whole_list_with_the_values_of_json(cli, local):
    texts = ['a "b", c', "=1+2", "+x", "-y", "@z", "two\nlines", " \u03bb"]
    payload = {"workflow": {"name": "w", "user": "tester"}, "jobs": [
        {"name": f"j{number}", "command": text, "depends_on_job_ids": list(range(1, number))}
        for number, text in enumerate(texts, 1)]}
    local.post("/workflow_specs", payload)
    rows = csv_rows(cli("-f", "csv", "jobs", "list", 1, "--include-relationships", ok=0)[1])
    assert [row["command"] for row in rows] == texts
    assert rows[2]["depends_on_job_ids"] == "[1,2]" and rows[0]["status"] == "uninitialized"
    assert cli("jobs", "list", 1, "--format=csv", "-s", "failed", ok=0)[1] == \
        "id,name,status,attempt_id,priority,command\r\n"
    assert rows[0]["id"] == csv_rows(cli("jobs", "list", 1, "-f", "csv", "-x", "command", ok=0)[1])[0]["id"]


def test_csv_has_bytes_minutes_and_nothing_for_what_is_absent(cli, local, monkeypatch):
    workflow_id, ids = make(local, {"a": []})
    end_jobs(local, workflow_id, ids, a=0)
    row, = csv_rows(cli("results", "list", "-f", "csv", ok=0)[1])
    assert (row["job_name"], row["exec_time_minutes"], row["peak_memory_bytes"]) == ("a", "0.5", "")
    assert csv_rows(cli("compute-nodes", "list", "-f", "csv", ok=0)[1])[0]["is_active"] == "true"
    (whole, _), (partition, *_) = (csv_rows(cli(*words, "-f", "csv", ok=0)[1]) for words in (
        ("hpc", "list"), ("hpc", "partitions", "kestrel")))
    assert whole["own"] == "false" and partition["memory_mb"] == "246064"
    monkeypatch.setattr(torc, "show_record", lambda args, record: torc.write_csv(["x", "y"], [
        {"x": math.nan}, {"x": 1e-7, "y": None}]))
    assert cli("jobs", "get", 1, ok=0)[1] == "x,y\r\n,\r\n1e-07,\r\n"


@pytest.mark.parametrize("name", sorted(torc.COMMANDS))
def test_csv_is_for_lists_and_refused_before_anything_is_done(cli, local, monkeypatch, name):
    prints_list = any(option.dest == "format" for option in torc.COMMANDS[name].options)
    assert prints_list == bool(re.search(
        r" list|job-dependencies|sacct|stats|partitions|match|plan-alloc|examples|failures|doctor", name))
    if not prints_list:
        called = []
        monkeypatch.setitem(torc.COMMANDS, name, torc.COMMANDS[name]._replace(
            function=lambda *args: called.append(name), texts=("[WORD...]",)))
        code, out, err = cli("-f", "csv", *name.split())
        assert (code, out, called) == (2, "", []) and f"torc {name} has no CSV output (only lists do): use -f json" in err


def test_a_list_of_many_jobs_streams_as_csv(cli, local, monkeypatch):
    make(local, {f"j{number}": [] for number in range(25)}, start=False)
    monkeypatch.setattr(torc, "PAGE_SIZE", 10)
    seen, get = [], torc.LocalClient.request
    monkeypatch.setattr(torc.LocalClient, "request", lambda self, method, path, query=None, body=None: (
        path == "/jobs" and seen.append(sys.stdout.getvalue().count("\n")), get(self, method, path, query, body))[1])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert torc.main(["jobs", "list", "1", "-f", "csv"]) == 0
    assert seen == [0, 11, 21] and sys.stdout.getvalue().count("\n") == 26


def test_tables_have_times_that_people_read_and_json_has_minutes(cli, local):
    workflow_id, ids = make(local, {"a": [], "b": []})
    end_jobs(local, workflow_id, ids, a=0, b=0)
    local.put("/results/1", {"exec_time_minutes": 3.2})
    lines = cli("results", "list", ok=0)[1].splitlines()
    assert "Exec Time  " in lines[1] and "    3m12s  " in lines[3] and "      30s  " in lines[4]
    assert cli_json(cli, "results", "list")["results"][0]["exec_time_minutes"] == 3.2
    assert cli("results", "get", 1, ok=0)[1].count("3m12s") == 1


def test_archived_workflows_are_marked_in_lists(cli, local):
    for _ in range(2):
        make(local, {"a": []})
    cli("workflows", "archive", "true", 1, ok=0)
    assert [one["is_archived"] for one in cli_json(cli, "workflows", "list", "--include-archived")["workflows"]] == [
        True, False]
    lines = cli("workflows", "list", "--include-archived", ok=0)[1].splitlines()
    at = lines[1].index("Archived")
    assert [line[at:at + 3] for line in lines[3:5]] == ["yes", "no "]
    assert [row["is_archived"] for row in csv_rows(
        cli("workflows", "list", "--archived-only", "-f", "csv", ok=0)[1])] == ["true"]
    assert "Archived" not in cli("workflows", "list", ok=0)[1]


def test_shared_workflows_are_listed_but_are_not_her_only_one(cli, walls, monkeypatch):
    server, clients = walls
    for name in ("hers", "not hers"):
        workflow = clients["alice"].post("/workflows", {"name": name, "user": "alice"})
    group = clients["zoe"].post("/access_groups", {"name": "team"})["id"]
    clients["zoe"].post(f"/access_groups/{group}/members", {"user_name": "bob", "role": "member"})
    clients["alice"].post(f"/workflows/1/access_groups/{group}")
    monkeypatch.setenv("TORC_API_URL", server.url)
    for user, password, names in (("bob", BOB, ["hers"]), ("zoe", "zoe's own", []),
                                  ("alice", ALICE, ["hers", "not hers"])):
        monkeypatch.setenv("TORC_USERNAME", user)
        monkeypatch.setenv("TORC_PASSWORD", password)
        assert [one["name"] for one in cli_json(cli, "workflows", "list")["workflows"]] == names, user
        assert cli("workflows", "list", ok=0)[1].partition("\n")[2].count(" alice") == len(names)
        page = types.SimpleNamespace(everybody=False, filter="", offset=0, limit=9)
        assert {one["name"] for one in torc.load_workflows(clients[user], page, None)["rows"]} == set(names)
        if user == "bob":
            assert "bob has no workflow" in cli("status")[2]
            own = clients["bob"].post("/workflows", {"name": "own", "user": "bob"})["id"]
            assert cli_json(cli, "status")["workflow_id"] == own != workflow["id"]


def test_the_database_last_used_here_is_found_and_named(cli, tmp_path):
    cli("run", "--example", "hello", "-o", "results", ok=0)
    assert not (tmp_path / "torc_output").exists()
    said = "using the local database results/torc.db, the last one used here\n"
    for words in (("logs", 1), ("status", 1), ("why", 1), ("run", 1), ("jobs", "list", 1)):
        assert said in cli(*words, ok=0)[2], words
    cli("create", "--example", "diamond", ok=0)          # what is new goes where it always went
    assert cli_json(cli, "workflows", "list")["workflows"][0]["name"] == "diamond"
    assert "database results/torc.db\n" in cli("status", 1, "-o", "results", ok=0)[2]
    assert said in cli("run", 1, "-o", "more", ok=0)[2]          # one without a database of its own
    shutil.rmtree(tmp_path / "results")
    assert "database torc_output/torc.db\n" in cli("workflows", "list", ok=0)[2]


def test_a_run_goes_on_in_the_output_directory_of_the_last_one(cli, local, tmp_path):
    make(local, {"a": [], "b": ["a"]}, a={"command": "test -e here"})
    assert "output in results" in cli("run", 1, "-o", "results", ok=1)[2]
    assert "output in results\n" in cli("run", 1, "--failed", ok=1)[2]
    assert not os.path.exists(tmp_path / "torc_output/job_stdio")
    assert "output in torc_output\n" in cli("run", 1, "--failed", "--output-dir=torc_output", ok=1)[2]
    cli("run", 1, "--failed", "-oresults", ok=1)
    started = torc.plan_run(local, 1, torc.Wishes()).choices[0].do(local)
    (tmp_path / "here").touch()
    assert "output in results\n" in cli(*started.words, "--failed", ok=0)[2]
    shutil.rmtree(tmp_path / "results")
    assert "output in torc_output\n" in cli("run", 1, ok=0)[2]


def test_a_database_of_another_user_and_a_home_without_room_are_no_trap(cli, tmp_path, monkeypatch):
    cli("run", "--example", "hello", "-o", "results", ok=0)
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert "no database torc_output/torc.db" in cli("jobs", "list", 1)[2]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/proc/none")
    cli("run", "--example", "hello", "-o", "results", ok=0)
    cli("status", "-o", "results", 2, ok=0)


# ---- which workflow

def test_the_only_workflow_is_taken_and_named(cli, local):
    workflow_id, _ = make(local, {"a": []})
    _, out, err = cli("jobs", "list", ok=0)
    assert f'workflow {workflow_id} "test"' in err and "Total: 1 job" in out


def test_of_several_workflows_none_is_guessed(cli, local):
    make(local, {"a": []})
    make(local, {"a": []})
    code, out, err = cli("status")
    assert (code, out) == (2, "") and err.count(" test ") == 2 and err.endswith("for example:\n  torc status 2\n")
    local.put("/workflows/2/status", {"run_id": 1, "is_canceled": False, "is_archived": True})
    assert cli("status", ok=0)[1].startswith('Workflow 1 "test"')


def test_a_question_at_the_terminal_picks_a_workflow(cli, local, monkeypatch):
    make(local, {"a": []})
    make(local, {"a": [], "b": []})
    monkeypatch.setattr(torc, "can_ask", lambda: True)
    monkeypatch.setattr(torc, "ask", lambda question: "2")
    assert "2 jobs" in cli("jobs", "list", ok=0)[1]
    monkeypatch.setattr(torc, "ask", lambda question: "7")
    assert cli("jobs", "list")[0] == 1


# ---- names in place of ids

def named_workflow(client, name, *jobs, **lists):
    """The id of a workflow with these jobs."""
    return client.post("/workflow_specs", {"workflow": {"name": name, "user": "tester"}, **lists, "jobs": [
        {"name": job, "command": "true"} for job in jobs]})["id"]


@pytest.mark.parametrize("text, found", [
    ("b", 2), ("study/b", 2), ("1/b", 2), ("a/b", 3), ("study/a/b", 3), ("other/c", 5), ("latest/c", 5), ("2/5", 6),
    ("c", 5), ("4", 4), ("raw/x/y", 7), ("Study/b", None), ("b*", None), ("study/c", None), ("latest/b", None)])
def test_a_job_is_named_by_id_name_or_workflow_and_name(cli, local, text, found):
    named_workflow(local, "study", "a", "b", "a/b", "sim[1]")
    named_workflow(local, "raw/x", "c", "5", "y")
    local.put("/workflows/2", {"name": "other" if "raw" not in text else "raw/x"})
    code, out, err = cli("-f", "json", "jobs", "get", text)
    assert code == (0 if found else 1), err
    assert found is None or json.loads(out)["id"] == found


def test_a_name_in_several_workflows_is_refused_and_listed(cli, local):
    for name in ("study", "study2"):
        named_workflow(local, name, "b", "b_2")
    code, out, err = cli("why", "b")
    assert (code, out) == (2, "") and 'which job "b"?' in err and err.endswith("for example:\n  torc why 3\n")
    assert re.findall(r'(\d) +b +\d "(\w+)" of tester', err) == [("3", "study2"), ("1", "study")]
    assert cli("jobs", "cancel", "b*", "--dry-run")[0] == 2
    local.put("/workflows/2/status", {"run_id": 0, "is_canceled": False, "is_archived": True})
    assert cli_json(cli, "why", "b")["job_id"] == 1
    assert cli_json(cli, "why", "study2/b")["job_id"] == 3


def test_a_name_that_does_not_exist_is_answered_with_the_nearest(cli, local):
    named_workflow(local, "study", *(f"align_{number:04d}" for number in range(1500)))
    for words, hint in (("why algin_1499", "align_1499"), ("why study/algin_1499", "align_1499"),
                        ("status stduy", "study"), ("wait stdy", "study"), ("run stuyd", "study")):
        code, out, err = cli(*words.split())
        assert (code, out) == (1, "") and f'(did you mean "{hint}"?)' in err, err
    assert "there is no file nowhere, and there is no workflow" in cli("run", "nowhere")[2]
    assert "result records have no names" in cli("results", "get", "x")[2]


@pytest.mark.parametrize("pattern, found", [
    ("align_*", {"align_1", "align_2"}), ("align_[!1]", {"align_2"}), ("?", {"b"}), ("study/align_?", {"align_1", "align_2"}),
    ("sim[1]", {"sim[1]"}), ("sim*", {"sim[1]", "sim1"}), ("1,b", {"align_1", "b"}), ("2,3", {"align_2", "b"})])
def test_jobs_are_meant_by_a_pattern_where_there_may_be_several(cli, local, pattern, found):
    workflow_id = named_workflow(local, "study", "align_1", "align_2", "b", "sim[1]", "sim1")
    torc.initialize_new(local, workflow_id)
    code, _, err = cli("jobs", "cancel", *([pattern] if pattern != "1,b" else ["1", "b", "1"]))
    assert code == 0, err
    assert {name for name, status in statuses(local, workflow_id).items() if status == "canceled"} == found


def test_a_workflow_is_named_by_id_name_or_latest(cli, local):
    for name in ("study", "study", "last"):
        named_workflow(local, name, "a")
    assert cli_json(cli, "status", "last")["workflow_id"] == cli_json(cli, "status", "latest")["workflow_id"] == 3
    code, _, err = cli("status", "study")
    assert code == 2 and 'which workflow "study"?' in err and err.endswith("for example:\n  torc status 2\n")
    cli("workflows", "archive", "true", 2, ok=0)
    assert cli_json(cli, "status", "study")["workflow_id"] == 1       # the others are out of sight
    cli("workflows", "archive", "true", "last", ok=0)
    assert cli_json(cli, "status", "latest")["workflow_id"] == 1
    cli("workflows", "archive", "false", "last", ok=0)
    assert cli_json(cli, "jobs", "list", "last")["jobs"][0]["id"] == 3
    cli("delete", "last", "--force", ok=0)
    assert [one["id"] for one in local.items("/workflows")] == [1, 2]


def test_run_and_submit_take_the_name_of_a_workflow_unless_a_file_has_it(cli, local):
    named_workflow(local, "study", "a")
    os.mkdir("study")                     # a directory is no specification
    for text in ("study", "latest"):
        assert "run workflow 1 here" in cli("run", text, "--dry-run", ok=0)[1]
    assert "study.yaml" in cli("run", "study.yaml")[2]
    assert "there is no workflow" not in cli("submit", "study", "--dry-run")[2]
    os.rmdir("study")
    Path("study").write_text(json.dumps({"name": "new", "jobs": [{"name": "x", "command": "true"}]}))
    assert "workflow 1" not in "".join(cli("run", "study", "--dry-run")[1:])


def test_other_records_are_named_too(cli, local):
    named_workflow(local, "study", "a", files=[{"name": "f", "path": "p"}], user_data=[{"name": "u", "data": 1}],
                   resource_requirements=[{"name": "large", "num_cpus": 4}],
                   failure_handlers=[{"name": "h", "rules": "[]"}])
    assert cli_json(cli, "files", "get", "f")["path"] == "p"
    assert cli_json(cli, "failure-handlers", "get", "h")["name"] == "h"
    cli("jobs", "create", "study", "-n", "b", "-c", "true", "-r", "large", "-b", "a", "-i", "f", ok=0)
    job = local.get("/jobs/2")
    assert (job["depends_on_job_ids"], job["input_file_ids"]) == ([1], [1])
    assert cli_json(cli, "resource-requirements", "get", job["resource_requirements_id"])["name"] == "large"
    assert [one["name"] for one in cli_json(cli, "jobs", "list", "study", "--upstream-job-id", "a")["jobs"]] == ["b"]


def test_inside_a_job_its_own_workflow_is_meant(cli, local, monkeypatch):
    for name in ("mine", "theirs"):
        named_workflow(local, name, "a", user_data=[{"name": "config", "data": name}, {"name": "config2"}])
    monkeypatch.setenv("TORC_WORKFLOW_ID", "1")
    assert cli_json(cli, "user-data", "get", "config")["data"] == "mine"
    assert cli("user-data", "get", "config", "--value", ok=0)[1] == '"mine"\n'
    assert [one["workflow_id"] for one in cli_json(cli, "user-data", "list")["user_data"]] == [1, 1]
    assert cli_json(cli, "why", "a")["job_id"] == 1 and cli_json(cli, "status")["workflow_id"] == 1
    cli("user-data", "update", "config", "-d", "2", ok=0)
    assert local.get("/user_data/1")["data"] == 2
    code, _, err = cli("user-data", "get", "confg")
    assert code == 1 and '"confg" in workflow 1 (did you mean "config"?)' in err
    local.delete("/workflows/1")          # of another database it has the id of nothing
    assert cli_json(cli, "--database", "torc_output/torc.db", "status")["workflow_id"] == 2


def test_json_comes_from_a_file_or_standard_input(cli, local, tmp_path):
    named_workflow(local, "study", "a")
    Path("value.json").write_text('{"a": "\u00e9"}', encoding="utf-8")
    cli("user-data", "create", "-n", "u", "-d", "@value.json", ok=0)
    assert local.get("/user_data/1")["data"] == {"a": "\u00e9"}
    for words, text in ((["-d", "-"], "[1]"), (["--data", "@-"], "2")):
        done = subprocess.run([*COMMAND, "--database", "torc_output/torc.db", "user-data", "update", "u", *words],
                              input=text, text=True, capture_output=True)
        assert done.returncode == 0 and local.get("/user_data/1")["data"] == json.loads(text), done.stderr
    assert "nothing.json: No such file" in cli("user-data", "update", "u", "-d", "@nothing.json")[2]
    Path("bad.json").write_text("{")
    assert "bad.json: Expecting" in cli("user-data", "update", "u", "-d", "@bad.json")[2]
    assert local.get("/user_data/1")["data"] == 2


def test_a_group_is_named(cli, local):
    named_workflow(local, "study", "a")
    cli("access-groups", "create", "climate", ok=0)
    assert cli("access-groups", "add-user", "climate", "bob", ok=0)[1].startswith("Added bob")
    cli("access-groups", "add-workflow", "study", "climate", ok=0)
    assert [one["user_name"] for one in cli_json(cli, "access-groups", "list-members", "climate")["members"]] == ["bob"]
    code, _, err = cli("access-groups", "get", "climat")
    assert code == 1 and 'no access group "climat" (did you mean "climate"?)' in err


# ---- life of a workflow

SPEC = {"name": "small", "jobs": [{"name": "a", "command": "true"},
                                  {"name": "b", "command": "true", "depends_on": ["a"]}]}


def test_create_makes_a_workflow_and_a_dry_run_nothing(cli, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SPEC))
    answer = cli_json(cli, "create", "small.json", "--dry-run")
    assert answer["valid"] and answer["summary"]["job_count"] == 2
    assert not os.path.exists("torc_output")
    assert "Validation: PASSED" in cli("create", "small.json", "--dry-run", ok=0)[1]
    answer = cli_json(cli, "create", "small.json")
    assert (answer["workflow_id"], answer["status"]) == (1, "success")
    assert cli_json(cli, "status")["jobs_by_status"]["uninitialized"] == 2


def test_every_error_of_a_specification_is_a_line(cli, monkeypatch, tmp_path):
    def fail(path, text=None, skip_checks=False):
        raise torc.SpecError(["first", "second"])

    monkeypatch.setattr(torc, "read_spec", fail)
    (tmp_path / "bad.json").write_text("{}")
    code, out, err = cli("create", "bad.json", "-f", "json")
    assert code == 1 and err == "torc: first\ntorc: second\n"
    assert json.loads(out)["error"]["errors"] == ["first", "second"]
    answer = cli_json(cli, "create", "bad.json", "--dry-run", ok=1)
    assert (answer["valid"], answer["errors"]) == (False, ["first", "second"])


def test_examples_are_listed_and_printed(cli):
    names = [row["name"] for row in cli_json(cli, "examples")["examples"]]
    assert names == list(torc.SPEC_EXAMPLES)
    assert json.loads(cli("examples", names[0], ok=0)[1])["name"]
    assert cli("examples", "nonsense")[0] == 2


def test_run_creates_initializes_and_hands_over_to_the_runner(cli, monkeypatch, tmp_path):
    seen = []

    class FakeRunner:
        gave_up, end_time = False, 9.0

        def __init__(self, client, workflow_id, options):
            seen.append((statuses(client, workflow_id), options))

        def run(self):
            return 3

    monkeypatch.setattr(torc, "Runner", FakeRunner)
    (tmp_path / "small.json").write_text(json.dumps(SPEC))
    code, _, err = cli("run", "small.json", "--num-cpus", 2, "--end-time", "1970-01-01T00:00:09Z")
    assert code == 3 and 'created workflow 1 "small" (2 jobs)' in err
    found, options = seen[0]
    assert found == {"a": "ready", "b": "blocked"}
    assert (options.num_cpus, options.end_time, options.output_dir) == (2, 9.0, "torc_output")


def test_run_refuses_missing_inputs_before_anything_is_created(cli, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({
        "name": "s", "files": [{"name": "f", "path": "not-there.txt"}],
        "jobs": [{"name": "a", "command": "true", "input_files": ["f"]}]}))
    code, _, err = cli("run", "s.json")
    assert code == 1 and '"not-there.txt"' in err
    assert cli_json(cli, "workflows", "list") == {"workflows": []}


def test_sentences_that_end_with_a_command_end_with_one_that_exists():
    """Such a command is printed on a line of its own, to be pasted."""
    tree, found = ast.parse(SOURCE), []
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in inside or not isinstance(node, (ast.JoinedStr, ast.Constant)):
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "1"
                       for part in parts)
        match = torc.NEXT_COMMAND.fullmatch(text)
        if match and "\n" not in text and match[2].startswith("torc ") and not re.search(r"torc 1| 1 1", match[2]):
            found.append(match[2])
            head, name, rest = torc.find_command(shlex.split(match[2])[1:])
            torc.parse_command(torc.COMMANDS[name], head, rest)
    assert len(found) > 20


PASTED = {
    # what is typed first, and the commands that its last line leads to, one after the other
    "ends": ("create fine.json", ["run 1", ""]),
    "fails": ("run bad.json -o out", ["failures 1", "run 1 --failed", "failures 1"]),
    "is interrupted": ("run bad.json --time-limit PT0S", ["run 1", "failures 1"]),
    "waits": ("run wait.json", ["jobs resolve 1 retry", "run 1", "jobs resolve 1 retry"]),
    "does not fit": ("run large.json", ["why 1", "run 1"]),
    "is canceled": ("create fine.json && torc cancel 1", ["run 1 --failed", ""]),
    "is archived": ("create fine.json && torc workflows archive true 1 && torc run 1",
                    ["workflows archive false 1", ""]),
    "lacks memory": ("run memory.json", ["failures 1", "recover 1", "run 1"]),
    "is over": ("run fine.json && torc run 1 --dry-run", ["workflows init 1"]),
    "has no such example": ("run --example nothing", ["examples", ""]),
    "is reset": ("run bad.json && true; torc workflows reset-status 1 --no-prompts", ["run 1"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PASTED)
def test_the_last_line_of_a_command_works_when_it_is_pasted(case, tmp_path):
    job = {"name": "a", "command": "true", "resource_requirements": "r"}
    needs = {"name": "r", "num_cpus": 1, "memory": "64m", "runtime": "PT1M"}
    for name, changed, more in (
            ("fine", {}, {}), ("bad", {"command": "echo no >&2; exit 3"}, {}),
            ("wait", {"command": "exit 3"}, {"use_pending_failed": True}),
            ("large", {}, {"resource_requirements": [{**needs, "num_cpus": 10_000}]}),
            ("memory", {"command": "exit 137"}, {})):
        (tmp_path / f"{name}.json").write_text(json.dumps({
            "name": name, "resource_requirements": [needs], "jobs": [{**job, **changed}], **more}))
    program = tmp_path / "torc"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, COMMAND))} "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "TORC_HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = f"torc {PASTED[case][0]}"
    for wanted in PASTED[case][1]:
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT, env=environment)
        last = done.stdout.splitlines()[-1]
        assert done.returncode in (0, 1, 2 if "example" in case else 3), done.stdout
        if not wanted:
            assert not last.startswith("  "), done.stdout
            return
        assert last == f"  torc {wanted}", done.stdout
        line = last


def test_a_program_that_is_not_installed_is_pasted_by_its_file(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "a", "jobs": [{"name": "a", "command": "true"}]}')
    done = subprocess.run([PYTHON, TORC, "create", "a.json", "--database", "x y.db"], cwd=tmp_path,
                          capture_output=True, text=True)
    words = shlex.split(done.stderr.splitlines()[-1])
    assert shutil.which(words[0]) and words[1:] == [str(TORC), "run", "1", "--database", "x y.db"]


REFUSED = """
import sys, threading, time
import torc
client = torc.LocalClient("x.db")
workflow_id = client.post("/workflows", {"name": "w", "user": client.user})["id"]
client.post("/bulk_jobs", {"jobs": [{"workflow_id": workflow_id, "name": name, "command": "sleep 60"} for name in "ab"]})
torc.initialize_new(client, workflow_id)
runner = torc.Runner(client, workflow_id, torc.RunOptions(output_dir="out", max_parallel_jobs=2))
request, refused = client.request, []

def refuse(*args, **more):
    if len(runner.children) == 2 and threading.current_thread() is runner.talker and not refused:
        refused.append(True)
        raise torc.Forbidden("the password has changed")
    return request(*args, **more)

def hurry():
    while not refused:
        runner.wake()
        time.sleep(0.05)

client.request = refuse
threading.Thread(target=hurry, daemon=True).start()
print(runner.run())
"""


def test_a_runner_that_is_refused_ends_its_jobs_and_says_so(tmp_path):
    done = subprocess.run([PYTHON, "-c", REFUSED], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "1\n" and "it will be tried again" in done.stderr, done


@pytest.mark.parametrize("text", [
    "RuntimeError: torc can't find it", "x: torc delete 1 --force", "x: torc ", "x: torc nothing", "x: sbatch 'a", "x: torc run 1 \\"])
def test_what_a_job_wrote_is_never_taken_for_a_command(cli, local, text):
    workflow_id, ids = make(local, {"a": []})
    talk = Conversation(local, workflow_id)
    job = talk.step(limit=1)["jobs"][0]
    talk.step([talk.done(job, 1, stderr_tail=f"{text}\n")])
    for words in (("why", ids["a"]), ("failures", 1), ("status", 1)):
        out = cli(*words, ok=0)[1]
        assert f": {text.strip()}\n" in out and "  torc delete" not in out, out


def test_an_output_directory_that_is_named_has_the_database_meant(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SPEC))
    environment = {**os.environ, "TORC_HOME": str(tmp_path / "home")}

    def said(*words):
        return subprocess.run([*COMMAND, *words], cwd=tmp_path, env=environment, capture_output=True, text=True).stderr

    said("create", "a.json")
    assert "the local database results/torc.db\n" in said("run", "a.json", "-o", "results")
    assert "results/torc.db, the last one used here" in said("status", "1")
    assert "the last one used here" in said("compute-nodes", "list", "1", "-o", "0")     # an offset
    told = said("status", "1", "-otorc_output")
    assert "the local database torc_output/torc.db\n" in told and told.endswith(" run 1 -otorc_output\n")


def test_an_ambiguous_name_is_replaced_where_it_was_typed(tmp_path):
    client = torc.LocalClient(str(tmp_path / "x.db"))
    for _ in range(2):
        client.post("/workflows", {"name": "study", "user": client.user})
    client.close()
    done = subprocess.run([*COMMAND, "workflows", "archive", "true", "study", "--database", "x.db"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("  torc workflows archive true 2 --database x.db"), done.stderr


def test_run_of_a_canceled_workflow_says_how_to_go_on(cli, local):
    make(local, {"a": []})
    cli("cancel", 1, ok=0)
    code, _, err = cli("run", "1")
    assert code == 1 and err.endswith("to start it again:\n  torc run 1 --failed\n")
    local.post("/scheduled_compute_nodes", {"workflow_id": 1, "scheduler_id": 7, "scheduler_type": "slurm",
                                            "scheduler_config_id": 1, "status": "complete"})
    for words in (("run", 1), ("why", 1), ("status", 1)):
        assert "workflow 1 is canceled; to start it again, first torc workflows reset-status 1 " \
            "--failed-only --reinitialize, then:\n  torc submit 1\n" in "".join(cli(*words)[1:]), words


def test_status_has_no_negative_times_and_all_its_fields(cli, local):
    workflow_id, ids = make(local, {"a": [], "b": ["a"]})
    report = cli_json(cli, "status")
    assert report["total_exec_time_formatted"] == "0.0s" and report["walltime_seconds"] == 0
    assert len(report["jobs_by_status"]) == 11 and not report["is_complete"]
    assert cli("status", ok=0)[2].endswith("to run it:\n  torc run 1\n")
    end_jobs(local, workflow_id, ids, a=0, b=0)
    assert cli_json(cli, "status")["total_exec_time_minutes"] == 1.0
    assert "complete" in cli("status", ok=0)[1]


@pytest.mark.parametrize("codes, expected", [
    ({"a": 0, "b": 0}, 0), ({"a": 0, "b": 1}, 1), ({"a": 1}, 1)])
def test_wait_answers_with_the_exit_code_of_the_end(cli, local, codes, expected):
    workflow_id, ids = make(local, {"a": [], "b": ["a"]})
    end_jobs(local, workflow_id, ids, **codes)
    assert cli("wait", "--timeout", 5)[0] == expected


def test_wait_ends_with_3_at_its_timeout_and_when_nothing_can_happen(cli, local):
    make(local, {"a": []})
    code, _, err = cli("wait", "--timeout", "0.1")
    assert code == 3 and "not ended" in err
    assert err.count("no runner is active on workflow 1:\n  torc run 1\n") == 1
    make(local, {"a": []}, start=False)
    code, _, err = cli("wait", 2)
    assert code == 3 and '"a" (job 2, uninitialized)' in err


def test_delete_asks_and_without_a_terminal_wants_force(cli, local, monkeypatch):
    make(local, {"a": []})
    code, _, err = cli("delete", 1)
    assert code == 2 and "--force" in err
    monkeypatch.setattr(torc, "can_ask", lambda: True)
    monkeypatch.setattr(torc, "ask", lambda question: "n")
    assert cli("delete", 1)[0] == 1
    assert cli("delete", 1, "--dry-run", ok=0)[1] == (
        'Dry run: delete workflow 1 "test"\n  1 job and 0 results are deleted; files on disk are kept.\n')
    monkeypatch.setattr(torc, "ask", lambda question: "y")
    assert cli("delete", 1, ok=0)[1] == 'Deleted workflow 1 "test"\n'
    assert cli_json(cli, "workflows", "list") == {"workflows": []}


def test_delete_names_what_it_could_not_and_spares_others_workflows(cli, local):
    make(local, {"a": []})
    foreign = torc.LocalClient(local.path, "ann", local.store)
    make(foreign, {"a": []})
    code, out, err = cli("delete", "1,2", 9, "--force", "-f", "json")
    assert code == 1 and [row["id"] for row in json.loads(out)] == [1]
    assert "belongs to ann" in err and "9" in err


def test_a_success_is_not_canceled_afterwards(cli, local):
    cli("run", "--example", "hello", ok=0)
    for words in ((), ("--dry-run",)):
        assert "has ended already: there is nothing to cancel" in cli("cancel", 1, *words, ok=0)[1]
    cli("wait", 1, ok=0)


def test_recover_with_json_is_one_document(cli, local, tmp_path):
    (tmp_path / "w.yaml").write_text("name: w\njobs:\n  - {name: a, command: exit 1}\n")
    cli("run", "w.yaml", ok=1)
    code, out, _ = cli("recover", 1, "--dry-run", "-f", "json")
    assert code == 1 and "1 job failed for other reasons" in json.loads(out)["error"]["message"]


def test_a_job_ended_by_its_runners_time_limit_is_not_told_of_another(cli, local, tmp_path):
    (tmp_path / "w.yaml").write_text("name: w\njobs:\n  - {name: a, command: sleep 60}\n")
    cli("run", "w.yaml", "--time-limit", "PT3S")
    assert "Ended by the runner's time limit after" in cli("why", 1)[1]
    assert "ended by the runner's time limit after" in cli("recover", 1, "--dry-run", "--no-prompts")[1]


@pytest.mark.slow
def test_recover_gives_a_job_a_longer_time_out_and_so_does_a_person(cli, local, tmp_path):
    (tmp_path / "w.yaml").write_text("name: w\njobs:\n  - {name: a, command: sleep 1.5, timeout: PT1S}\n")
    cli("run", "w.yaml", ok=1)
    assert "its time-out is 1.0s, then timeout PT1M" in cli("recover", 1, "--dry-run", "--no-prompts", ok=0)[1]
    cli("recover", 1, "--force", ok=0)
    cli("run", 1, ok=0)
    assert (local.get("/jobs/1")["timeout"], local.get("/resource_requirements/1")["name"]) == ("PT1M", "default")
    cli("jobs", "update", 1, "--timeout", "PT2M", ok=0)
    assert local.get("/jobs/1")["timeout"] == "PT2M"


def test_a_handler_is_created_and_bad_rules_are_refused(cli, local):
    make(local, {"a": []})
    create = ("failure-handlers", "create", 1, "-n", "h", "--rules")
    for rules, said in (
            ("{", "rules: '{' is not JSON"), ('"x"', "rules: 'x' is not JSON"), ("3", "rules: 3 is not an object"),
            ('[{"on": ["oom"], "max_retry": 3}]', "rules: unknown field 'max_retry' (did you mean \"max_retries\"?)"),
            ('[{"on": ["oom"], "memory_multiplier": 0.5}]', "rules: memory_multiplier: 0.5 is not a number above 1"),
            ('[{"exit_codes": [1], "max_retries": 3, "max_attempts": 3}]', "are the same: keep one"),
            ('[{"on": []}]', "so it never applies")):
        code, _, err = cli(*create, rules)
        assert code and said in err, (rules, code, err)
    assert "Created failure handler 1" in cli(*create, '[{"on": ["oom"], "max_attempts": 5}]', ok=0)[1]
    assert local.get("/failure_handlers/1")["rules"] == '[{"on":["oom"],"max_retries":5}]'     # as Torc calls it


def test_cancel_and_its_dry_run(cli, local):
    make(local, {"a": []})
    assert cli_json(cli, "cancel", "--dry-run")["job_count"] == 0
    assert not local.get("/workflows/1/status")["is_canceled"]
    assert cli_json(cli, "cancel")["status"] == "success"
    assert local.get("/workflows/1/status")["is_canceled"]


# ---- output of jobs

def test_logs_come_from_the_node_that_ran_the_job(cli, local, tmp_path):
    workflow_id, ids = make(local, {"a": []})
    node = make_node(local, workflow_id, output_dir=str(tmp_path / "out"))
    complete(local, ids["a"], workflow_id, node, 1)
    for ending, text in (("o", "to stdout\n"), ("e", "to stderr\n")):
        path = tmp_path / "out" / stdio_name(workflow_id, ids["a"], 1, 1, ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cli("logs", ids["a"], "--stdout", ok=0)[1] == "to stdout\n"
    assert cli("logs", ids["a"], "--stderr", "--follow", ok=0)[1] == "to stderr\n"
    out = cli("logs", ids["a"], ok=0)[1]
    assert "==> " in out and out.endswith("to stderr\n")
    assert cli("logs", ids["a"], "--attempt", 2)[0] == 1


def written_jobs(local, directory, outputs):
    """{job: id} of ended jobs. outputs: {job: (return code, stdout, stderr)}."""
    workflow_id, ids = make(local, {name: [] for name in outputs})
    node = make_node(local, workflow_id, output_dir=str(directory))
    (directory / "job_stdio").mkdir(parents=True)
    for name, (code, *texts) in outputs.items():
        complete(local, ids[name], workflow_id, node, code)
        for ending, text in zip("oe", texts):
            (directory / stdio_name(workflow_id, ids[name], 1, 1, ending)).write_text(text)
    return ids


def test_logs_of_several_jobs_begin_each_line_with_the_name(cli, local, tmp_path):
    lines = "".join(f"line {number}\n" for number in range(20_000))
    ids = written_jobs(local, tmp_path / "out", {
        "a_1": (0, lines, ""), "a_2": (1, "no end", "oops\n"), "b": (1, "", "x\ny\n"), "c": (0, "", "")})
    assert cli("logs", "a_*", "-n", 1, ok=0)[1] == "a_1 | line 19999\na_2 | no end\na_2 | oops\n"
    assert cli("logs", ids["a_1"], "--stdout", ok=0)[1] == lines
    assert cli("logs", "a_1", "--tail", 2, ok=0)[1].endswith("<==\nline 19998\nline 19999\n")
    failed = "a_2 | no end\na_2 | oops\nb | x\nb | y\n"
    for words in (["--failed"], ["--failed", "-w", "test"], ["a_2", "b", "--follow"], ["-w", 1, "a_2", "b"]):
        assert cli("logs", *words, ok=0)[1] == failed, words
    assert cli("logs", "--failed", "--stderr", "-n", 1, ok=0)[1] == "a_2 | oops\nb | y\n"
    assert [row["job_name"] for row in cli_json(cli, "logs", "a_1", "b")["jobs"]] == ["a_1", "b"]
    for words in (["c"], ["c", "--follow"], ["c", "--stderr"]):
        _, out, err = cli("logs", *words, ok=0)
        assert out == "" and re.search(r'job 4 "c" wrote nothing to \S+', err), err
    os.unlink(tmp_path / "out" / stdio_name(1, 2, 1, 1, "o"))
    os.unlink(tmp_path / "out" / stdio_name(1, 2, 1, 1, "e"))
    code, out, err = cli("logs", "--failed")
    assert code == 1 and out.endswith("x\ny\n") and "there is no file" in err


def test_the_output_in_a_directory_of_another_user_is_no_missing_file(cli, local, tmp_path, monkeypatch):
    written_jobs(local, tmp_path / "out", {"a": (1, "", "secret\n")})
    inside, seen = f"{tmp_path}/out/", os.path.exists

    def denied(path, *more, **options):
        if str(path).startswith(inside):
            raise PermissionError(torc.errno.EACCES, "Permission denied", str(path))
        return open(path, *more, **options)

    monkeypatch.setattr(os.path, "exists", lambda path: seen(path) and not str(path).startswith(inside))
    monkeypatch.setattr(torc, "open", denied, raising=False)      # mode 0700
    said = f"permission denied: {inside}{stdio_name(1, 1, 1, 1, 'o')}. It is for tester, whose"
    for words in (("logs", 1), ("logs", "--failed"), ("logs", 1, "-f", "json")):
        code, _, err = cli(*words)
        assert code == 1 and said in err and err.endswith("\n  torc logs 1\n"), err
    cli("why", 1, ok=0)
    assert "ermission denied:" in Hands(local, tmp_path).press("g", "j", "l")


def test_the_json_of_logs_names_what_is_not_kept(cli, local):
    workflow_id, ids = make(local, {"a": []}, a={"stdio": json.dumps({"mode": "none"})})
    end_jobs(local, workflow_id, ids, a=0)
    found = cli_json(cli, "logs", "a")
    assert (found["job_stdout"], found["job_stderr"], found["existing"]) == (None, None, [])
    assert "does not keep that output" in cli("logs", "a")[2]


def test_logs_of_failures_there_are_none_of_say_so(cli, local):
    make(local, {"a": []})
    for words in ([], ["1", "--failed"]):
        code, _, err = cli("logs", *words)
        assert code == 2 and "name a job, or --failed for all that failed" in err
    assert cli("logs", "--failed", ok=0)[1] == "No failed jobs found.\n"
    assert cli_json(cli, "logs", "--failed") == {"jobs": []}


def test_the_tail_of_a_large_file_is_read_alone(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(2**40)              # reading all of it would never end
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast but one\nlast\n")
    assert torc.tail_position(path, 2) == 2**40 + 1
    assert torc.tail_position(path, None) == torc.tail_position(tmp_path / "none", 3) == 0


def test_logs_of_a_job_that_never_ran_say_so(cli, local):
    make(local, {"a": []})
    code, _, err = cli("logs", 1)
    assert code == 1 and "ready" in err and "torc why 1" in err


def test_settings_of_a_workflow_do_not_get_in_each_others_way():
    workflow = {"execution_config": '{"enabled": true, "timeout_exit_code": null, "mode": "direct"}',
                "resource_monitor_config": '{"enabled": false, "mode": "slurm"}'}
    limits = torc.read_limits(workflow)
    assert (limits.enabled, limits.mode, limits.timeout_exit_code) == (False, "direct", 152)


def test_a_refused_change_of_a_job_leaves_its_requirements(cli, local):
    local.post("/workflows", {"name": "w", "user": "u"})
    needs = local.post("/resource_requirements", {"workflow_id": 1, "name": "r", "runtime": "PT1M"})
    for name in ("a", "b"):
        local.post("/jobs", {"workflow_id": 1, "name": name, "command": "true",
                             "resource_requirements_id": needs["id"]})
    before = list(local.items("/resource_requirements", workflow_id=1))
    assert cli("jobs", "update", 1, "-n", "b", "--runtime", "PT7M")[0] == 1
    assert list(local.items("/resource_requirements", workflow_id=1)) == before
    cli("jobs", "update", 1, "-n", "c", "--runtime", "PT7M", ok=0)
    job = local.get("/jobs/1")
    own = local.get(f"/resource_requirements/{job['resource_requirements_id']}")
    assert (job["name"], own["runtime"], own["name"]) == ("c", "PT7M", "c_1")


@pytest.mark.parametrize("mode, endings", sorted(torc.STDIO_ENDINGS.items()))
def test_the_log_report_names_files_as_the_stdio_mode_does(cli, local, mode, endings):
    workflow_id, ids = make(local, {"a": []}, a={"stdio": json.dumps({"mode": mode})})
    node = make_node(local, workflow_id, output_dir="/somewhere")
    complete(local, ids["a"], workflow_id, node)
    row = json.loads(cli("results", "list", "--include-logs", ok=0)[1])["results"][0]
    for key, ending in zip(("job_stdout", "job_stderr"), endings):
        assert (key in row) == (ending is not None)
        if ending:
            assert row[key] == "/somewhere/" + stdio_name(workflow_id, ids["a"], 1, 1, ending)


def test_why_adds_the_last_lines_of_stderr(cli, local):
    workflow_id, ids = make(local, {"a": [], "b": ["a"]})
    assert 'waits for "a"' in cli("why", ids["b"], ok=0)[1]
    talk = Conversation(local, workflow_id)
    job = talk.step(limit=1)["jobs"][0]
    talk.step([talk.done(job, 1, stderr_tail="one\ntwo\n")])
    out = cli("why", ids["a"], ok=0)[1]
    assert "return code 1" in out and out.count("two") == 1
    assert "(run 1, attempt 1): two\n  stderr| one\n" in out
    assert out.endswith(f"Then torc jobs retry 1 runs it again; what it wrote:\n  torc logs {ids['a']}\n")
    assert cli_json(cli, "why", ids["a"])["stderr_tail"] == "one\ntwo\n"


def test_why_of_a_job_without_stderr_says_so_and_where_something_is(cli, local, tmp_path):
    workflow_id, ids = make(local, {"a": []})
    directory = tmp_path / "out"
    (directory / "job_stdio").mkdir(parents=True)
    complete(local, ids["a"], workflow_id, make_node(local, workflow_id, output_dir=str(directory)), 1)
    assert "nothing to stderr" not in cli("why", ids["a"], ok=0)[1]       # its files are elsewhere
    for ending in ("e", "o"):
        (directory / stdio_name(workflow_id, ids["a"], 1, 1, ending)).touch()
    assert "  It wrote nothing to stderr, nor to stdout.\n" in cli("why", ids["a"], ok=0)[1]
    (directory / stdio_name(workflow_id, ids["a"], 1, 1, "o")).write_text("x")
    assert f"torc logs {ids['a']} --stdout shows what it wrote to stdout" in cli("why", ids["a"], ok=0)[1]


def test_a_job_killed_for_memory_is_run_again_by_the_commands_of_why(cli, local):
    past = Past(local, {"a": []})
    past.end("a", 5, 10, code=137)
    out = cli("why", past.ids["a"], ok=0)[1]
    assert out.endswith("To request more before torc jobs retry 1:\n  torc jobs update 1 --memory 2g\n")
    cli("jobs", "update", 1, "--memory", "2g", ok=0)
    cli("jobs", "retry", 1, "--force", ok=0)
    assert statuses(local, past.workflow_id) == {"a": "ready"}


# ---- records

RECORDS = [
    ("files", ["-n", "f", "-p", "a b.txt"], ["-p", "c.txt"], {"path": "c.txt"}),
    ("user-data", ["-n", "u", "-d", '{"x": [1]}'], ["-d", "2"], {"data": 2}),
    ("resource-requirements", ["-n", "r", "-m", "2g"], ["--num-cpus", "3"],
     {"num_cpus": 3, "memory": "2g"}),
]


@pytest.mark.parametrize("word, create, update, expected", RECORDS)
def test_a_record_is_created_listed_changed_shown_and_deleted(cli, local, word, create, update,
                                                              expected):
    make(local, {"a": []}, start=False)
    record = cli_json(cli, word, "create", 1, *create)
    key = word.replace("-", "_")
    assert record["id"] in [row["id"] for row in cli_json(cli, word, "list", 1)[key]]
    assert "Total: " in cli(word, "list", 1, ok=0)[1]
    changed = cli_json(cli, word, "update", record["id"], *update)
    assert {name: changed[name] for name in expected} == expected
    assert cli_json(cli, word, "get", record["id"])["name"] == record["name"]
    assert re.search(r"^name: +\w", cli(word, "get", record["id"], ok=0)[1], re.M)
    cli(word, "delete", record["id"], "--dry-run", ok=0)
    assert cli_json(cli, word, "delete", record["id"])["id"] == record["id"]
    assert cli(word, "get", record["id"])[0] == 1


def test_renaming_a_file_keeps_its_time(cli, local):
    make(local, {"a": []}, start=False)
    local.post("/files", {"workflow_id": 1, "name": "f", "path": "p", "st_mtime": 5.5})
    assert cli_json(cli, "files", "update", 1, "-n", "g")["st_mtime"] == 5.5


@pytest.mark.parametrize("words, key", [
    ("workflows list", "workflows"), ("results list 1", "results"), ("events list 1", "events"),
    ("failure-handlers list 1", "failure_handlers"), ("compute-nodes list 1", "compute_nodes"),
    ("scheduled-compute-nodes list 1", "scheduled_compute_nodes"),
    ("job-dependencies job-job 1", "job_dependencies"),
    ("job-dependencies job-file 1", "job_file_relationships"),
    ("job-dependencies job-user-data 1", "job_user_data_relationships"),
    ("jobs list-resource-requirements 1", "jobs"), ("jobs list-failure-handlers 1", "jobs"),
    ("files list-required-existing 1", "files"), ("user-data list-missing 1", "user_data"),
    ("workflows list-actions 1", "actions")])
def test_every_list_is_wrapped_in_its_key(cli, local, words, key):
    make(local, {"a": [], "b": ["a"]})
    assert list(cli_json(cli, *words.split())) == [key]
    cli(*words.split(), ok=0)


def test_delete_all_wants_a_yes(cli, local):
    make(local, {"a": [], "b": []}, start=False)
    assert cli("jobs", "delete-all", 1)[0] == 2
    assert cli_json(cli, "jobs", "delete-all", 1, "--dry-run")["count"] == 2
    assert cli_json(cli, "jobs", "delete-all", 1, "--force")["count"] == 2
    assert cli_json(cli, "jobs", "list", 1) == {"jobs": []}


def test_jobs_are_created_one_by_one_and_from_a_file(cli, local, tmp_path):
    make(local, {}, start=False)
    first = cli_json(cli, "jobs", "create", 1, "-n", "job7", "-c", "true")
    second = cli_json(cli, "jobs", "create", 1, "-n", "b", "-c", "true", "-b", first["id"])
    assert second["depends_on_job_ids"] == [first["id"]]
    (tmp_path / "list.txt").write_text("# comment\n\necho 1\n  echo 2\n")
    made = cli_json(cli, "jobs", "create-from-file", 1, "list.txt", "--cpus-per-job", 2)
    assert made["jobs_created"] == 2
    jobs = {job["name"]: job["command"] for job in cli_json(cli, "jobs", "list", 1)["jobs"]}
    assert jobs["job8"] == "echo 1" and jobs["job9"] == "echo 2"


def test_status_says_why_ready_jobs_do_not_run(cli, tmp_path):
    write_spec(tmp_path, {f"j{number}": {"command": "true", "limits": ["io"]} for number in range(3)}, limits={"io": 1})
    cli("create", "spec.json", ok=0)
    with contextlib.closing(torc.LocalClient("torc_output/torc.db")) as client:
        client.put("/workflows/1/status", {"run_id": 1, "is_canceled": False})
        client.post("/workflows/1/initialize_jobs")
        Conversation(client, 1).step(limit=9)
    assert '2 ready jobs: each needs 1 of the limit "io" (0 of 1 free)\n' in cli("status", 1, ok=0)[1]


def test_variables_are_set_and_removed_by_name(cli):
    cli("run", "--example", "hello", ok=0)
    cli("jobs", "update", 1, "--env", "A=1", "--env", "B=x=y", ok=0)
    cli("jobs", "update", 1, "--env", "A=", "--env", "C=7", ok=0)
    assert json.loads(cli("jobs", "get", 1, "-f", "json")[1])["env"] == {"B": "x=y", "C": "7"}
    cli("workflows", "update", 1, "--env", "W=w", "--limit", "io=8", "--limit", "lic=1", ok=0)
    workflow = json.loads(cli("workflows", "get", 1, "-f", "json")[1])
    assert (workflow["env"], workflow["limits"]) == ({"W": "w"}, {"io": 8, "lic": 1})
    cli("jobs", "update", 1, "--limit", "io=8", ok=0)
    code, _, err = cli("workflows", "update", 1, "--limit", "io=")
    assert code == 1 and 'job "hello": limits: it asks for {"io":8}, the workflow has {"lic":1}' in err
    cli("workflows", "export", 1, "-o", "w.json", ok=0)
    cli("workflows", "import", "w.json", ok=0)
    copies = [json.loads(cli("jobs", "get", number, "-f", "json")[1]) for number in (1, 2)]
    assert [(job["env"], job["limits"]) for job in copies] == [({"B": "x=y", "C": "7"}, {"io": 8})] * 2
    assert json.loads(cli("workflows", "get", 2, "-f", "json")[1])["limits"] == {"io": 8, "lic": 1}
    code, _, err = cli("jobs", "update", 1, "--env", "TORC_JOB_ID=3")
    assert code == 1 and "env: TORC_JOB_ID: '3' is not a string (quote it) under a name" in err


# ---- commands without a specification

def kept_jobs(path):
    """{name: (command, status)} of all jobs in a database."""
    with contextlib.closing(torc.LocalClient(str(path))) as client:
        return {job["name"]: (job["command"], job["status"]) for workflow in client.items("/workflows")
                for job in client.items("/jobs", workflow_id=workflow["id"])}


def test_exec_runs_the_commands_of_files_options_and_words(cli, tmp_path):
    (tmp_path / "list.txt").write_text("# comment\n\nX=1 /bin/echo 1\n  (echo 2)\n")
    _, out, err = cli("exec", "-C", "list.txt", "-c", "echo 3 >&2", "-k", "-j", 1, "--",
                      "echo", "-n", "a  b", "it's", ok=0)
    assert out == "1\n2\na  b it's" and "\n3\n" in err
    assert 'workflow 1 "echo"' in err
    assert kept_jobs("torc_output/torc.db") == {
        "echo_1": ("echo 3 >&2", "completed"), "echo_2": ("X=1 /bin/echo 1", "completed"),
        "echo_3": ("(echo 2)", "completed"),
        "echo_4": ("echo -n 'a  b' 'it'\"'\"'s'", "completed")}
    assert sorted(os.listdir()) == ["list.txt", "torc_output"]


@pytest.mark.parametrize("link, made", [
    ("product", {"echo_1_x=1_y=a": "echo 01 a", "echo_1_x=1_y=b": "echo 01 b",
                 "echo_1_x=2_y=a": "echo 02 a", "echo_1_x=2_y=b": "echo 02 b"}),
    ("zip", {"echo_1_x=1_y=a": "echo 01 a", "echo_1_x=2_y=b": "echo 02 b"})])
def test_exec_makes_a_job_for_each_value_of_its_parameters(cli, link, made):
    words = ["exec", "-c", "echo {x:02d} {y}", "--param", "x=1:2", "--param", "y=[a,b]", "--link", link]
    assert cli(*words, "--dry-run", ok=0)[1] == "\n".join(made.values()) + "\n"
    assert cli_json(cli, *words, "--dry-run") == {"commands": list(made.values())}
    assert os.listdir() == []
    assert cli(*words, "-k", ok=0)[1] == "".join(f"{text[5:]}\n" for text in made.values())
    assert {name: command for name, (command, _) in kept_jobs("torc_output/torc.db").items()} == made


@pytest.mark.parametrize("words, hint", [
    (["exec"], "torc exec -C commands.txt -j 8"),
    (["exec", "-C", "list.txt"], "list.txt holds no commands"),
    (["exec", "-C", "none.txt"], "none.txt: No such file"),
    (["exec", "-C", "a.yaml"], "a.yaml is a specification, to run it:"),
    (["exec", "a.json"], "if it is a specification:"),
    (["exec", "echo", "-n", "x"], "put -- before echo, so that its options"),
    (["exec", "-c", "x", "--param", "lr"], "'lr' has no values"),
    (["exec", "-c", "x $lr", "--param", "lr=1:3"], "is not in 'x $lr'"),
    (["exec", "-c", "x {i+1} {i}", "--param", "i=1:3"], "{i+1} is left as it is"),
    (["exec", "-c", "x {i}", "--param", "i=3:1"], "'3:1' is empty"),
    (["exec", "-c", "x {i} {j}", "--param", "i=1:3", "--param", "j=1:2", "--link", "zip"],
     "needs lists of one length: i has 3 values, j has 2 values"),
    (["exec", "-c", "x", "--monitor", "yes"], "invalid choice")])
def test_exec_says_what_is_wrong_with_its_command_line_and_makes_nothing(cli, tmp_path, words, hint):
    (tmp_path / "list.txt").write_text("# nothing\n")
    code, out, err = cli(*words)
    assert code in (1, 2) and not out and err.startswith("torc: ") and hint in err, err
    assert " line 1" not in err
    assert os.listdir() == ["list.txt"]


def test_exec_resumes_what_has_not_completed_of_the_same_commands(cli, tmp_path):
    (tmp_path / "list.txt").write_text("echo a\necho b; [ -e good ]\n")
    assert cli("exec", "-C", "list.txt", "-k")[:2] == (1, "a\nb\n")
    cli("exec", "-c", "echo other", ok=0)
    (tmp_path / "good").touch()
    assert "echo_2 (failed)" in cli("exec", "-C", "list.txt", "--resume", "--dry-run", ok=0)[1]
    assert cli("exec", "-C", "list.txt", "--resume", "-k", ok=0)[1] == "b\n"
    _, out, err = cli("exec", "-C", "list.txt", "--resume", "-k", ok=0)
    assert out == "" and "workflow 1: 0 jobs to run again" in err
    cli("cancel", 2, ok=0)
    assert cli("exec", "-C", "list.txt", "-c", "echo c", "--resume", "-k", ok=0)[1] == "c\na\nb\n"
    assert [one["name"] for one in cli_json(cli, "workflows", "list")["workflows"]] == ["echo"] * 3


def test_exec_gives_each_job_its_requirements_and_measures_as_it_is_told(cli):
    cli("exec", "-c", "true", "--num-cpus", 2, "--memory", "1g", "--runtime", "PT5M", "-n", "x",
        "--monitor", "time-series", "-i", 3, "--stdio", "none", "--description", "d", ok=0)
    cli("exec", "-c", "true", "--monitor", "off", "--tail", ok=0)
    first, second = cli_json(cli, "workflows", "list")["workflows"]
    assert (first["name"], first["description"], second["name"]) == ("x", "d", "true")
    assert json.loads(first["resource_monitor_config"]) == {
        "enabled": True, "granularity": "time_series", "sample_interval_seconds": 3}
    assert not json.loads(second["resource_monitor_config"])["enabled"]
    config = json.loads(first["execution_config"])
    assert config["limit_resources"] and config["stdio"]["mode"] == "none"
    assert not json.loads(second["execution_config"])["limit_resources"]
    needs = [(need["num_cpus"], need["memory"], need["runtime"]) for need in cli_json(
        cli, "resource-requirements", "list", 1)["resource_requirements"]]
    assert (2, "1g", "PT5M") in needs


def exec_process(directory, *words, **options):
    """`torc exec ...` as a process."""
    return subprocess.Popen([*COMMAND, "exec", *map(str, words)], cwd=directory, text=True,
                            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                               "stderr": subprocess.PIPE, **options})


def test_exec_prints_each_output_whole_as_it_ends_or_in_order(tmp_path):
    slow = "echo 1; until [ -e done ]; do sleep 0.02; done; echo 2"
    words = ["-j", 2, "-c", slow, "-c", "echo 3; echo 4; echo e >&2", "-c", "touch done"]
    out, err = exec_process(tmp_path, *words, "--tail").communicate(timeout=60)
    assert out == "3\n4\n1\n2\n" and "\ne\n" in err
    (tmp_path / "done").unlink()
    assert exec_process(tmp_path, *words, "-k").communicate(timeout=60)[0] == "1\n2\n3\n4\n"
    (tmp_path / "done").unlink()
    out, _ = exec_process(tmp_path, *words, "-k", "--stdio", "combined").communicate(timeout=60)
    assert out == "1\n2\n3\n4\ne\n"


def test_exec_reads_commands_from_a_pipe_and_a_reader_that_leaves_ends_no_job(tmp_path):
    lines = "".join(f"seq {number} {number + 20_000}\n" for number in range(20))
    done = subprocess.run(["bash", "-c", f"{shlex.join(COMMAND)} exec -C - --tail | head -1"], input=lines,
                          cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert len(done.stdout.splitlines()) == 1 and "20 completed" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_exec_ends_its_jobs_at_a_signal_and_goes_on_where_it_was(tmp_path):
    words = ["-j", 1, "-c", "echo 1", "-c", "[ -e second ] || { touch second; sleep 600; }; echo 2",
             "-c", "echo 3"]
    process = exec_process(tmp_path, *words, "-k")
    until((tmp_path / "second").exists)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "1\n"), err
    until(lambda: not processes_in(tmp_path))
    assert exec_process(tmp_path, *words, "-k", "--resume").communicate(timeout=60)[0] == "2\n3\n"
    assert set(dict(kept_jobs(tmp_path / "torc_output/torc.db").values()).values()) == {"completed"}


def test_exec_goes_on_after_its_runner_was_killed(tmp_path):
    words = ["-j", 1, "-c", "echo 1", "-c", "[ -e second ]", "-c",
             "[ -e second ] || { touch second; sleep 600; }; echo 3", "-c", "echo 4"]
    process = exec_process(tmp_path, *words)
    until((tmp_path / "second").exists)
    until(lambda: "failed" in dict(kept_jobs(tmp_path / "torc_output/torc.db").values()).values())
    process.kill(), process.communicate()
    out, err = exec_process(tmp_path, *words, "--resume", "--dry-run").communicate(timeout=60)
    assert "_2 (failed)" in out, err
    out, err = exec_process(tmp_path, *words, "--resume", "-k").communicate(timeout=60)
    assert sorted(out.split()) == ["3", "4"] and "4 completed" in err, err


def test_exec_works_with_a_server_that_wants_a_password_and_inside_a_job(cli, tmp_path, passwords, monkeypatch):
    monkeypatch.setenv("TORC_USERNAME", "alice")
    monkeypatch.setenv("TORC_PASSWORD", ALICE)
    with guarded(tmp_path / "x.db", passwords, "--require-auth").closing() as server:
        words = ["exec", "--url", server.url, "-c", "test -n $TORC_JOB_ID && echo hello", "-k"]
        assert cli(*words, ok=0)[1] == "hello\n"
        assert cli(*words, "-o", "elsewhere", "--resume", ok=0)[1] == "hello\n"
        assert cli(*words, "--resume", ok=0)[1] == ""
        assert len(cli_json(cli, "workflows", "list", "--url", server.url)["workflows"]) == 2
    inner = shlex.join([*COMMAND, "exec", "-k", "-c", "echo inner"])
    monkeypatch.delenv("TORC_USERNAME"), monkeypatch.delenv("TORC_PASSWORD")
    assert cli("exec", "-c", inner, "-k", ok=0)[1] == "inner\n"


def test_where_several_are_meant_the_example_is_the_command_as_it_was_typed(cli, local):
    for _ in range(2):
        make(local, {"a": []})
    for words, then in ((["jobs", "update", "a", "-c", "echo 'x y'"], ["jobs", "update", "2", "-c", "echo 'x y'"]),
                        (["logs", "--failed"], ["logs", "--failed", "--workflow", "2"]),
                        (["results", "list", "--failed"], ["results", "list", "--failed", "2"])):
        err = cli(*words)[2]
        assert "for example:" in err and err.endswith(f" {shlex.join(then)}\n"), err


def test_requirements_of_one_job_leave_the_others_alone(cli, local):
    make(local, {"a": [], "b": []}, start=False)
    code, _, err = cli("jobs", "update", 1, "--runtime", "PT2H", "--priority", 4)
    assert code == 2 and "job 1 has no resource requirements yet: give --memory" in err
    assert cli_json(cli, "jobs", "get", 1).get("priority") != 4
    cli("jobs", "update", 1, "--memory", "2g", ok=0)
    cli("jobs", "update", 1, "--runtime", "PT3H", "--num-cpus", 2, "--num-gpus", 1, "--priority", 4, ok=0)
    rows = cli_json(cli, "jobs", "list-resource-requirements", 1)["jobs"]
    assert [[row[name] for name in ("memory", "runtime", "num_cpus", "num_gpus", "num_nodes")] for row in rows] == [
        ["2g", "PT3H", 2, 1, 1], ["1m", "P0DT1M", 1, 0, 1]]
    other = local.post("/resource_requirements", {"workflow_id": 1, "name": "r", "memory": "5g", "runtime": "PT9M"})
    cli("jobs", "update", 2, "--resource-requirements-id", other["id"], "--memory", "6g", ok=0)
    rows = cli_json(cli, "jobs", "list-resource-requirements", 1)["jobs"]
    assert (rows[1]["memory"], rows[1]["runtime"]) == ("6g", "PT9M")
    assert cli_json(cli, "jobs", "get", 1)["priority"] == 4


def undecided(client, jobs):
    """A workflow whose first job has failed and waits for a decision."""
    workflow_id, ids = make(client, jobs)
    first, node = next(iter(ids.values())), make_node(client, workflow_id)
    complete(client, first, workflow_id, node, 4, status="pending_failed")
    client.put(f"/compute_nodes/{node}", {"is_active": False})
    return workflow_id, first


def test_a_failure_that_waits_for_a_decision_is_retried_or_stands(cli, local):
    workflow_id, first = undecided(local, {"a": [], "b": ["a"], "c": ["b"]})
    for words in (("status", 1), ("why", first), ("wait", 1)):
        assert ("`retry` reruns failed jobs, `fail` makes their failure final:\n"
                f"  torc jobs resolve {first} retry\n") in "".join(cli(*words)[1:])
    assert cli("jobs", "resolve", first, "fail", "--dry-run", ok=0)[1].splitlines() == [
        'Dry run: decide on job 1 "a"',
        '  fail: Fail job 1 "a". Jobs that depend on this are canceled too, unless they say otherwise: "b"']
    assert statuses(local, 1)["a"] == "pending_failed"
    assert cli("jobs", "resolve", first, "retry", "--no-prompts", ok=0)[1] == 'job 1 "a" will run again\n'
    assert statuses(local, 1) == {"a": "ready", "b": "blocked", "c": "blocked"}
    assert local.get(f"/jobs/{first}")["attempt_id"] == 2
    assert "a does not need a decision: it is ready" in cli("jobs", "resolve", first, "fail")[2]
    _, first = undecided(local, {"a": [], "b": ["a"], "c": ["b"]})
    cli("jobs", "resolve", first, "fail", "--force", ok=0)
    assert statuses(local, 2) == {"a": "failed", "b": "canceled", "c": "canceled"}
    _, first = undecided(local, {"a": [], "b": ["a"]})
    local.put("/workflows/3/cancel")      # which cannot be retried
    cli("jobs", "resolve", first, "fail", "--force", ok=0)
    assert "with return code 4" in cli("why", first, ok=0)[1]
    with pytest.raises(torc.Invalid, match="not as failed"):
        local.post(f"/jobs/{first}/stop", status="failed")


def test_a_decision_is_offered_by_the_dashboard_and_the_terminal_too(client, tmp_path):
    workflow_id, first = undecided(client, {"a": [], "b": ["a"]})
    args = torc.parse_command(torc.COMMANDS["dash"], [], ["-o", str(tmp_path)])
    [group] = client.get(f"/workflows/{workflow_id}/failures")["groups"]
    body = {"workflow_id": workflow_id, "group": group["id"]}
    shown = torc.DashActions(args).do(client, "resolve", dry_run="true", **body)
    assert group["status"] == "pending_failed" and [key for key, _ in shown["choices"]] == ["r", "f"]
    assert [line.partition(":")[0] for line in shown["lines"]] == ["retry", "fail"]
    hands = Hands(client, tmp_path)
    hands.terminal.open("job", {"id": first, "name": "a"})
    hands.propagate()
    assert "torc jobs resolve" in " ".join(hands.text().split())
    screen = hands.press("D")
    assert "r run 1 job again" in screen and "f fail 1 job" in screen
    hands.press("r")
    assert statuses(client, workflow_id) == {"a": "ready", "b": "blocked"}
    workflow_id, first = undecided(client, {"a": [], "b": ["a"]})
    torc.DashActions(args).do(client, "resolve", choice="f", workflow_id=workflow_id, ids=str(first))
    assert statuses(client, workflow_id) == {"a": "failed", "b": "canceled"}


def test_the_failures_page_acts_on_the_job_in_focus(client, ui):
    undecided(client, {"a": [], "b": ["a"]})
    hands = ui()
    assert "The row in focus is of no job or workflow." in hands.press("g", "f", "D")
    while "Enter opens this job" not in hands.text():
        hands.press("j")
    assert "/ a / log" in hands.press("l")
    assert "f fail 1 job" in hands.press("q", "D")
    hands.press("f")
    assert statuses(client, 1) == {"a": "failed", "b": "canceled"}


def test_jobs_are_canceled_terminated_and_run_again(cli, local):
    make(local, {"a": [], "b": ["a"], "c": []})
    assert cli("jobs", "cancel", 1, "--dry-run", ok=0)[1] == (
        'Dry run: cancel job 1 "a"\n  1 waiting job will not start.\n'
        '  Jobs that depend on this are canceled too, unless they say otherwise: "b"\n')
    assert cli_json(cli, "jobs", "cancel", 1)["status"] == "canceled"
    assert statuses(local, 1) == {"a": "canceled", "b": "canceled", "c": "ready"}
    assert cli("jobs", "cancel", 1)[0] == 1
    cli("jobs", "terminate", 3, ok=0)
    cli("jobs", "retry", "1,3", ok=0)
    assert statuses(local, 1) == {"a": "ready", "b": "blocked", "c": "ready"}


def test_retry_names_what_runs_again_with_it(cli, local):
    workflow_id, ids = make(local, {"a": [], "b": ["a"], "c": ["b"]})
    node = end_jobs(local, workflow_id, ids, a=0, b=0, c=0)
    dry = 'Dry run: run job 1 "a" again\n  1 completed; earlier results are kept.\n'
    assert cli("jobs", "retry", 1, "--dry-run", ok=0)[1] == (
        dry + '  Jobs downstream that have already run will run again: "b", "c"\n')
    assert cli("jobs", "retry", 1, "--dry-run", "--only", ok=0)[1] == dry
    assert set(statuses(local, 1).values()) == {"completed"}
    cli("jobs", "retry", 1, "--only", ok=0)
    assert statuses(local, 1) == {"a": "ready", "b": "completed", "c": "completed"}
    complete(local, ids["a"], workflow_id, node, attempt=2)
    assert [row["reason"] for row in cli_json(cli, "workflows", "reinit", 1, "--dry-run")["jobs"]] == [
        '"a", on which it depends, ran again', 'it depends on "b", which runs again']
    cli("jobs", "retry", 1, ok=0)
    assert statuses(local, 1) == {"a": "ready", "b": "blocked", "c": "blocked"}
    code, _, err = cli("jobs", "retry", 2)
    assert code == 1 and "job 2 is blocked: only a job that has ended can be retried" in err


def test_the_json_of_what_was_done_says_that_it_was_no_dry_run(cli, local, tmp_path):
    (tmp_path / "w.json").write_text(json.dumps({"name": "w", "jobs": [{"name": "a", "command": "true"}]}))
    made = cli_json(cli, "create", "w.json")
    assert made["message"] == "Created workflow 1" and made["status"] == "success"
    make(local, {"b": []})
    for words in (["workflows", "reinit", 2], ["workflows", "reset-status", 2, "--no-prompts"],
                  ["workflows", "sync-status", 2], ["jobs", "delete-all", 2, "--force"]):
        assert cli_json(cli, *words, "--dry-run")["dry_run"] is True
        assert cli_json(cli, *words)["dry_run"] is False


def test_a_job_changes_no_user_data_of_another_workflow_by_mistake(cli, local, monkeypatch):
    mine, theirs = (make(local, {"a": []})[0] for _ in range(2))
    data = local.post("/user_data", {"workflow_id": theirs, "name": "u", "data": 1})["id"]
    monkeypatch.setenv("TORC_WORKFLOW_ID", str(mine))
    code, _, err = cli("user-data", "update", data, "-d", "2")
    assert code == 2 and f"user data {data} belongs to workflow {theirs}, but this job to workflow {mine}" in err
    assert local.get(f"/user_data/{data}")["data"] == 1
    cli("user-data", "update", data, "-d", "2", "--any-workflow", ok=0)
    monkeypatch.setenv("TORC_WORKFLOW_ID", str(theirs))
    cli("user-data", "update", data, "-d", "3", ok=0)
    assert local.get(f"/user_data/{data}")["data"] == 3


def test_results_are_filtered(cli, local):
    workflow_id, ids = make(local, {"a": [], "b": []})
    end_jobs(local, workflow_id, ids, a=0, b=7)
    for words in (["--failed"], ["--return-code", 7], ["-s", "failed"], ["-j", ids["b"]],
                  ["--failed", "-l", 1]):
        rows = cli_json(cli, "results", "list", 1, *words)["results"]
        assert [row["job_id"] for row in rows] == [ids["b"]], words
    assert len(cli_json(cli, "results", "list", 1, "-r", 1)["results"]) == 2
    assert re.search(r"\bb +1 +1 +1 +7 ", cli("results", "list", 1, ok=0)[1])


def test_sorting_by_a_field_there_is_not_names_the_nearest(cli, local):
    make(local, {"a": []})
    code, _, err = cli("jobs", "list", 1, "--sort-by", "nam")
    assert code == 2 and 'did you mean "name"?' in err


def test_events_are_filtered_by_type(cli, local):
    make(local, {"a": []}, start=False)
    cli("events", "create", 1, "-d", '{"category": "mine"}', ok=0)
    cli("events", "create", 1, "-d", "3", ok=0)
    assert len(cli_json(cli, "events", "list", 1, "-t", "mine")["events"]) == 1
    assert cli_json(cli, "events", "get-latest-event", 1)["data"] in (3, {"category": "mine"})


def test_workflows_are_made_changed_archived_and_brought_back(cli):
    assert cli_json(cli, "workflows", "new", "-n", "x")["user"] == "tester"
    assert cli_json(cli, "workflows", "update", 1, "--project", "p")["project"] == "p"
    cli("workflows", "archive", "true", 1, ok=0)
    assert cli_json(cli, "workflows", "list")["workflows"] == []
    assert len(cli_json(cli, "workflows", "list", "--archived-only")["workflows"]) == 1
    cli("workflows", "archive", "false", 1, ok=0)
    assert cli_json(cli, "workflows", "is-complete")["is_complete"]


# ---- initialize and reinitialize

def test_init_names_missing_inputs_and_its_dry_run_changes_nothing(cli, local, tmp_path):
    pipeline(local, tmp_path, start=False)
    report = cli_json(cli, "workflows", "init", 1, "--dry-run", ok=1)
    assert report["missing_input_files"] == ["in.txt"] and not report["safe"]
    code, _, err = cli("workflows", "init", 1)
    assert code == 1 and '"in.txt"' in err
    assert set(statuses(local, 1).values()) == {"uninitialized"}
    assert local.get("/workflows/1/status")["run_id"] == 0
    cli("workflows", "init", 1, "--force", ok=0)
    assert statuses(local, 1) == {"first": "ready", "second": "blocked", "alone": "ready"}


def test_init_of_an_initialized_workflow_wants_a_yes(cli, local, tmp_path):
    pipeline(local, tmp_path)
    assert cli("workflows", "init", 1)[0] == 2
    assert cli_json(cli, "workflows", "init", 1, "--dry-run")["existing_output_file_count"] == 2
    assert set(statuses(local, 1).values()) == {"completed"}
    cli("workflows", "init", 1, "--no-prompts", ok=0)
    assert statuses(local, 1)["first"] == "ready"
    assert local.get("/workflows/1/status")["run_id"] == 2


def change_user_data(directory, client):
    """Let "alone" read user data, run it, and change the data."""
    record = client.post("/user_data", {"workflow_id": 1, "name": "u", "data": 1},
                         consumer_job_id=3)
    torc.initialize_new(client, 1)
    finish_all(client, 1, directory)
    client.put(f"/user_data/{record['id']}", {"data": 2})


AFTER_FIRST = 'it depends on "first", which runs again'


@pytest.mark.parametrize("cause, reasons", [
    (lambda *_: None, {}),
    (lambda directory, _: touch(directory / "in.txt"),
     {"first": 'its input file "in.txt" changed', "second": AFTER_FIRST}),
    (lambda directory, _: touch(directory / "mid.txt"),
     {"second": 'its input file "mid.txt" changed'}),
    (lambda directory, _: (directory / "out.txt").unlink(),
     {"second": 'its output file "out.txt" is missing'}),
    (lambda directory, _: (directory / "mid.txt").unlink(),
     {"first": 'its output file "mid.txt" is missing', "second": AFTER_FIRST}),
    (change_user_data, {"alone": "its user data changed"}),
], ids=["nothing", "input_changed", "output_changed", "output_lost", "first_output_lost",
        "user_data_changed"])
def test_reinit_runs_again_what_changed_and_its_dry_run_names_the_same(cli, local, tmp_path, cause,
                                                                      reasons):
    pipeline(local, tmp_path)
    cause(tmp_path, local)
    run_id = local.get("/workflows/1/status")["run_id"]
    answer = cli_json(cli, "workflows", "reinit", 1, "--dry-run")
    assert {job["job_name"]: job["reason"] for job in answer["jobs"]} == reasons
    table = cli("workflows", "reinit", 1, "--dry-run", ok=0)[1]
    assert all(reason in table for reason in reasons.values())
    assert set(statuses(local, 1).values()) == {"completed"}
    assert local.get("/workflows/1/status")["run_id"] == run_id
    cli("workflows", "reinit", 1, ok=0)
    again = {name for name, status in statuses(local, 1).items() if status != "completed"}
    assert again == set(reasons)
    finish_all(local, 1, tmp_path)
    assert cli_json(cli, "workflows", "reinit", 1, "--dry-run")["jobs"] == []


def test_reinit_refuses_when_an_input_has_vanished(cli, local, tmp_path):
    pipeline(local, tmp_path)
    (tmp_path / "in.txt").unlink()
    answer = cli_json(cli, "workflows", "reinit", 1, "--dry-run", ok=1)
    assert answer["missing_input_files"] == ["in.txt"] and answer["job_count"] == 2
    code, _, err = cli("workflows", "reinit", 1)
    assert code == 1 and '"in.txt"' in err
    assert set(statuses(local, 1).values()) == {"completed"}
    cli("workflows", "reinit", 1, "--force", ok=0)
    assert statuses(local, 1)["first"] == "ready"


def test_reset_status_of_failures_takes_along_what_they_canceled(cli, local):
    workflow_id, ids = make(local, {"a": [], "b": ["a"], "c": []})
    end_jobs(local, workflow_id, ids, a=1, c=0)
    words = ("workflows", "reset-status", 1, "--failed-only")
    plan = cli_json(cli, *words, "--dry-run")
    assert {job["job_name"]: job["reason"] for job in plan["jobs"]} == {
        "a": "it failed", "b": "it was canceled"}
    assert cli(*words)[0] == 2            # nobody can be asked
    assert statuses(local, 1)["a"] == "failed"
    cli(*words, "--no-prompts", "--reinitialize", ok=0)
    assert statuses(local, 1) == {"a": "ready", "b": "blocked", "c": "completed"}
    cli("workflows", "reset-status", 1, "--no-prompts", ok=0)
    assert set(statuses(local, 1).values()) == {"uninitialized"}


def test_run_failed_resets_and_runs_in_one(cli, tmp_path):
    spec = write_spec(tmp_path, {"a": "test -e good", "b": {"command": "true", "depends_on": ["a"]}, "c": "true"})
    cli("run", spec, ok=1)
    plan = cli_json(cli, "run", 1, "--failed", "--dry-run")
    assert {job["job_name"]: job["reason"] for job in plan["jobs"]} == {"a": "it failed", "b": "it was canceled"}
    assert "  a (failed): it failed\n" in cli("run", 1, "--failed", "--dry-run", ok=0)[1]
    assert cli_json(cli, "status")["jobs_by_status"]["failed"] == 1
    (tmp_path / "good").touch()
    _, _, err = cli("run", 1, "--failed", ok=0)
    assert "torc: reset 2 jobs\n" in err and "have already ended" not in err
    assert len(cli_json(cli, "results", "list", "--all-runs")["results"]) == 4
    code, _, err = cli("run", 1, "--failed")
    assert code == 1 and "No job of workflow 1 has failed, so none is reset" in err
    for more in ((), ("--dry-run",)):
        code, _, err = cli("run", spec, "--failed", *more)
        assert code == 2 and "--failed runs the failed jobs of an existing workflow: name its id" in err
    assert len(cli_json(cli, "workflows", "list")["workflows"]) == 1


def test_run_failed_restarts_what_was_canceled_but_not_beside_a_runner(cli, local):
    workflow_id, ids = make(local, {"a": [], "b": ["a"]})
    node = end_jobs(local, workflow_id, ids, a=1)
    code, _, err = cli("run", 1, "--failed")
    assert code == 1 and "a runner works on workflow 1, on here; to wait for it:\n  torc wait 1\n" in err
    assert statuses(local, 1)["a"] == "failed"
    local.put(f"/compute_nodes/{node}", {"is_active": False})
    cli("cancel", 1, ok=0)
    cli("run", 1, "--failed", ok=0)
    assert statuses(local, 1) == {"a": "completed", "b": "completed"}


def test_a_canceled_workflow_of_which_nothing_failed_goes_on_too(cli, local):
    for start in (True, False):
        workflow_id, _ = make(local, {"a": [], "b": []}, start=start)
        cli("cancel", workflow_id, ok=0)
        cli("run", workflow_id, "--failed", ok=0)
        assert statuses(local, workflow_id) == {"a": "completed", "b": "completed"}
        assert not local.get(f"/workflows/{workflow_id}/counts")["is_canceled"]


def test_what_runs_again_is_to_be_run_whatever_their_number(cli, local):
    workflow_id, ids = make(local, {"a": [], "b": [], "c": ["b"]})
    local.put(f"/compute_nodes/{end_jobs(local, workflow_id, ids, a=1, b=2)}", {"is_active": False})
    assert cli("jobs", "retry", "1", "2", "--force", ok=0)[2].endswith("to run it:\n  torc run 1\n")


def test_wait_goes_on_when_its_server_is_back(tmp_path):
    server = Server(tmp_path / "x.db")
    make(server.client(), {"a": []})
    log = tmp_path / "wait.log"
    with open(log, "w") as file:
        waiting = subprocess.Popen([*COMMAND, "wait", "1", "--url", server.url], cwd=tmp_path, stderr=file,
                                   env={**os.environ, "TORC_HOME": str(tmp_path)})
    until(lambda: "no runner is active" in log.read_text())
    server.kill()
    until(lambda: "; trying again" in log.read_text())
    server = Server(tmp_path / "x.db", torc.split_url(server.url)[2])
    server.client().put("/workflows/1/cancel")
    assert waiting.wait(30) == 1
    server.stop()


def test_failures_are_listed_by_cause_with_their_jobs(cli, local):
    workflow_id, ids = make(local, {**{f"j{number:02d}": [] for number in range(13)}, "memory": [], "fine": []})
    assert cli("failures", ok=0)[1] == "No job of workflow 1 has failed.\n"
    end_jobs(local, workflow_id, ids, fine=0, **{f"j{number:02d}": 3 for number in range(13)})
    assert "Failures by cause:\n  13 jobs: exit 3\n" in cli("status", ok=0)[1]
    assert cli_json(cli, "status")["failures"] == [{"count": 13, "cause": "exit 3", "line": ""}]
    lines = cli("failures", ok=0)[1].splitlines()
    assert lines[:2] == ["13 jobs failed: exit 3", "  They fail alike: look at one before rerunning them."]
    assert lines[2].startswith('  "j12 (job 13)", "j11 (job 12)"') and lines[2].endswith('"j03 (job 4)" and 3 more')
    assert lines[3:] == ["What they wrote: torc logs --failed --workflow 1; to rerun the failed jobs:",
                         "  torc run 1 --failed"]
    local.post("/scheduled_compute_nodes", {"workflow_id": workflow_id, "scheduler_id": 7, "scheduler_type": "slurm",
                                            "scheduler_config_id": 1, "status": "complete"})
    assert cli("failures", ok=0)[1].endswith(
        "to rerun the failed jobs, first torc workflows reset-status 1 --failed-only --reinitialize, then:\n"
        "  torc submit 1\n")
    group, = cli_json(cli, "failures")["groups"]
    assert len(group["jobs"]) == group["count"] == 13
    rows = csv_rows(cli("failures", "-f", "csv", ok=0)[1])
    assert len(rows) == 13 and (rows[12]["job_name"], rows[12]["cause"]) == ("j00", "exit 3")
    cli("jobs", "update", ids["memory"], "--memory", "1g", ok=0)
    end_jobs(local, workflow_id, ids, memory=137)
    assert cli("failures", ok=0)[1].endswith("with more memory or time:\n  torc recover 1\n")


@pytest.mark.parametrize("words", ["reset-status 1 --no-prompts", "reset-status 1 --dry-run",
                                   "reset-status 1 -r --no-prompts", "reinit 1"])
def test_a_workflow_at_work_is_not_half_reset(cli, local, words):
    make(local, {"a": [], "b": []})
    talk = Conversation(local, 1)
    talk.step(limit=1)
    before = statuses(local, 1), local.get("/workflows/1/status")
    code, _, err = cli("workflows", *words.split())
    assert code == 1 and "is active" in err
    assert (statuses(local, 1), local.get("/workflows/1/status")) == before


def test_everything_runs_again_with_few_requests(local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    payload = {"workflow": {"name": "wide", "user": local.user},
               "files": [{"name": "in", "path": "in"}],
               "jobs": [{"name": f"j{number}", "command": "true", "input_file_ids": [1]}
                        for number in range(300)]}
    workflow_id = local.post("/workflow_specs", payload)["id"]
    (tmp_path / "in").write_text("")
    torc.initialize_new(local, workflow_id)
    finish_all(local, workflow_id, tmp_path)
    touch(tmp_path / "in")
    calls = []
    request = local.request
    monkeypatch.setattr(local, "request", lambda *args: calls.append(args) or request(*args))
    plan = torc.plan_reinitialize(local, workflow_id, torc.Wishes())
    plan.choices[0].do(local)
    assert plan.data["job_count"] == 300 and len(calls) < 25
    assert set(statuses(local, workflow_id).values()) == {"ready"}


# ---- completion, bundle, main

@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_valid_and_names_every_command(cli, tmp_path, shell):
    out = cli("completions", shell, ok=0)[1]
    assert all(name.split()[-1] in out for name in torc.COMMANDS)
    program = shutil.which(shell)
    if program:
        (tmp_path / "script").write_text(out)
        subprocess.run([program, "-n", str(tmp_path / "script")], check=True)


@pytest.mark.parametrize("words, expected", [
    ("jobs l", ["list", "list-failure-handlers", "list-resource-requirements"]),
    ("jobs list --st", ["--status"]), ("jobs list --status co", ["completed"]),
    ("-f j", ["json"]), ("-f json jobs li", ["list", "list-failure-handlers",
                                             "list-resource-requirements"]),
    ("run --out", ["--output-dir"]), ("run ./", []), ("create ''", []),
    ("workflows archive ''", []), ("completions ''", [])])
def test_bash_completes_commands_options_and_values(cli, tmp_path, words, expected):
    (tmp_path / "script").write_text(cli("completions", "bash", ok=0)[1])
    script = (f'source ./script; COMP_WORDS=(torc {words}); COMP_CWORD={len(words.split())}; _torc;'
              ' printf "%s\\n" "${COMPREPLY[@]}"')
    out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert sorted(out.split()) == expected


def test_a_bundle_is_one_executable_file_with_the_same_hash(cli, tmp_path):
    for name in torc.BUNDLED:
        pytest.importorskip(name)
    import zipfile
    cli("bundle", "torc.pyz", ok=0)
    first = (tmp_path / "torc.pyz").read_bytes()
    cli("bundle", "torc.pyz", ok=0)
    assert (tmp_path / "torc.pyz").read_bytes() == first
    assert os.listdir(tmp_path) == ["torc.pyz"] and os.access("torc.pyz", os.X_OK)
    names = zipfile.ZipFile("torc.pyz").namelist()
    assert {"__main__.py", "torc.py", "bottle.py", "waitress/__init__.py",
            "yaml/__init__.py"} <= set(names) and not any(name.endswith(".so") for name in names)
    import importlib.util
    compiled = f"torc.{importlib.util.MAGIC_NUMBER.hex()}"
    with zipfile.ZipFile("torc.pyz") as made, zipfile.ZipFile("other.pyz", "w") as other:
        for name in made.namelist():      # as another Python would have made it
            other.writestr(name.replace(compiled, "torc.00000000"), made.read(name))
    for name in ("torc.pyz", "other.pyz"):
        out = subprocess.run([PYTHON, "-I", name, "--version"], capture_output=True, text=True,
                             check=True).stdout
        assert out == cli("--version")[1]


def test_a_bundle_serves_with_nothing_installed(cli, tmp_path):
    for name in torc.BUNDLED:
        pytest.importorskip(name)
    cli("bundle", "torc.pyz", ok=0)
    process = subprocess.Popen(
        [PYTHON, "-I", "-S", "torc.pyz", "server", "--port", "0", "--database", "x.db"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().startswith("TORC_SERVER_PORT=")
    finally:
        process.terminate()
        process.communicate(timeout=20)


def read_report(text):
    """What is inside of a report."""
    packed = re.search(r'<script type="text/plain" id="report">([\w+/=]+)</script>', text)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_a_report_is_one_private_file_that_replaces_nothing(cli, client, tmp_path, monkeypatch):
    where = {"TORC_DATABASE": getattr(client, "path", None)} if client.is_local else {"TORC_API_URL": client.where}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    evil = "</script><script>alert(1)</script>"
    workflow_id, ids = make(client, {evil: [], "b": [evil]})
    complete(client, ids[evil], workflow_id, make_node(client, workflow_id), 3)
    done = cli_json(cli, "report", workflow_id)
    path = tmp_path / f"torc_report_{workflow_id}.html"
    assert done == {"path": path.name, "workflow_id": workflow_id, "job_count": 2}
    assert os.stat(path).st_mode & 0o777 == 0o600
    text = path.read_text()
    assert text.count("</script>") == 2 and "alert(1)" not in text and "</body>" in text
    assert "</script" not in torc.DASH_JS and "</style" not in torc.DASH_CSS
    report = read_report(text)
    fields, first, second = report["jobs"]
    assert dict(zip(fields, first))["name"] == evil and dict(zip(fields, second))["status"] == "canceled"
    assert report["failures"]["total"] == 1 and "env" not in report["workflow"]
    path.write_text("mine")
    _, _, err = cli("report", workflow_id, ok=1)
    assert "exists: name another file, or replace it with --force" in err and path.read_text() == "mine"
    cli("report", workflow_id, "--force", ok=0)
    assert read_report(path.read_text())["jobs"] == report["jobs"]
    assert read_report(cli("report", workflow_id, "-o", "-", ok=0)[1])["jobs"] == report["jobs"]
    _, _, err = cli("report", workflow_id, "-o", path / "r.html", ok=1)
    assert "r.html cannot be written: File exists" in err
    cli("report", 99, ok=1)


@pytest.mark.slow
def test_a_report_of_100000_jobs_is_below_20_mb(cli, tmp_path, monkeypatch):
    workflow_id = half_done(tmp_path / "views.db", 100_000)
    monkeypatch.setenv("TORC_DATABASE", str(tmp_path / "views.db"))
    cli("report", workflow_id, "-o", "big.html", ok=0)
    assert os.path.getsize("big.html") < 20e6
    assert len(read_report(Path("big.html").read_text())["jobs"]) > 99_000


def test_an_exported_workflow_is_made_anew(cli, api, tmp_path, monkeypatch):
    spec = tmp_path / "full.json"
    spec.write_text(json.dumps({
        "name": "full", "files": [{"name": "in", "path": "in.txt"}, {"name": "out", "path": "out.txt"}],
        "user_data": [{"name": "u", "data": {"x": 1}}],
        "resource_requirements": [{"name": "r", "num_cpus": 2, "memory": "1g", "runtime": "PT5M"}],
        "failure_handlers": [{"name": "h", "rules": [{"exit_codes": [3]}]}],
        "slurm_schedulers": [{"name": "s", "account": "a", "nodes": 2, "walltime": "01:00:00"}],
        "jobs": [{"name": "a", "command": "true", "input_files": ["in"], "output_files": ["out"],
                  "resource_requirements": "r", "failure_handler": "h", "scheduler": "s"},
                 {"name": "b", "command": "true", "input_files": ["out"], "input_user_data": ["u"],
                  "depends_on": ["a"], "priority": 3}],
        "actions": [{"trigger_type": "on_jobs_ready", "action_type": "schedule_nodes", "jobs": ["b"],
                     "scheduler": "s", "scheduler_type": "slurm"}]}))
    monkeypatch.setenv("TORC_DATABASE", api.path)
    cli("create", spec, ok=0)
    cli("workflows", "init", 1, "--force", ok=0)
    cli("workflows", "export", 1, "-o", "x.json", "--include-results", ok=0)
    assert os.stat("x.json").st_mode & 0o077 == 0
    cli("workflows", "import", "x.json", "--name", "again", ok=0)

    def shape(number):                    # without ids and times
        document = cli_json(cli, "workflows", "export", number)
        names = {key: {record["id"]: record.get("name") for record in document[key]}
                 for key in ("jobs", "files", "user_data", "resource_requirements", "slurm_schedulers",
                             "failure_handlers")}
        job_ids = {"depends_on_job_ids": "jobs", "input_file_ids": "files", "output_file_ids": "files",
                   "input_user_data_ids": "user_data"}
        return [{"name": job["name"], "priority": job["priority"],
                 "needs": names["resource_requirements"][job["resource_requirements_id"]],
                 "scheduler": names["slurm_schedulers"].get(job.get("scheduler_id")),
                 "handler": names["failure_handlers"].get(job.get("failure_handler_id")),
                 **{key: [names[table][one] for one in job.get(key, ())]
                    for key, table in job_ids.items()}} for job in document["jobs"]], [
            [names["jobs"][one] for one in action["job_ids"]] for action in document["workflow_actions"]]

    assert shape(1) == shape(2)
    assert cli_json(cli, "workflows", "get", 2)["name"] == "again"
    (tmp_path / "bad.json").write_text("{}")
    code, _, err = cli("workflows", "import", "bad.json")
    assert code == 1 and "this is not an exported workflow" in err


def test_the_other_programs_are_commands_of_this_one(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(torc, "serve", lambda args: seen.append((args.host, args.port)) or 0)
    for words in (["run", "--port", "1"], ["--port", "2"], []):
        monkeypatch.setattr(sys, "argv", ["torc-server", *words])
        assert torc.main_server() == 0
    assert seen == [("127.0.0.1", 1), ("127.0.0.1", 2), ("127.0.0.1", 8080)]


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "en_US.ISO-8859-1"])
def test_letters_that_the_locale_lacks_fail_no_job(tmp_path, locale):
    env = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if locale != "C":                     # not on every machine
        made = shutil.which("localedef") and subprocess.run(
            ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / locale)], capture_output=True)
        if not made or made.returncode:
            pytest.skip("localedef cannot make en_US.ISO-8859-1 here")
        env["LOCPATH"] = str(tmp_path)

    def run(*words, ok=0, **more):
        done = subprocess.run([*COMMAND, *words], capture_output=True, cwd=tmp_path, env=env, **more)
        assert done.returncode == ok, done.stderr
        return done.stdout

    (tmp_path / "in-\u6f22").write_text("x")
    (tmp_path / "\u03bb.json").write_text(json.dumps({
        "name": "\u03bb", "files": [{"name": "in", "path": "in-\u6f22"}, {"name": "out", "path": "\u03bb/\u6f22"}],
        "actions": [{"trigger_type": "on_workflow_start", "action_type": "run_commands",
                     "commands": ["mkdir ../\u03bb"]}],
        "jobs": [{"name": "j\u03bb\u6f22\xe9", "command": "cat ${files.input.in} > ${files.output.out}; echo \u03bb;"
                  " echo $TORC_JOB_NAME $LC_ALL ${PYTHONUTF8}"}]}, ensure_ascii=False), encoding="utf-8")
    run("run", "\u03bb.json", "-o", "out\u6f22")
    assert (tmp_path / "\u03bb" / "\u6f22").read_text() == "x"
    database = "--database", "out\u6f22/torc.db"
    logs = run("logs", "1", *database).decode()
    assert logs.endswith(f"\u03bb\nj\u03bb\u6f22\xe9 {locale} 0\n")
    assert rb"j\u03bb\u6f22" + (b"\xe9" if locale != "C" else rb"\xe9") in run("jobs", "list", "1", *database)
    assert json.loads(run("-f", "json", "jobs", "get", "1", *database))["name"] == "j\u03bb\u6f22\xe9"
    run("why", "1", *database)
    if locale != "C":                     # what is typed, and a directory that is named in the locale's letters
        run("workflows", "update", "1", "-n", b"\xe9", *database)
        assert json.loads(run("workflows", "get", "1", "-f", "json", *database))["name"] == "\xe9"
        os.mkdir(os.path.join(os.fsencode(tmp_path), b"\xe9"))
        run("run", "--example", "hello", "-o", b"\xe9")


def test_an_interrupt_is_130_and_a_closed_pipe_is_quiet(cli, monkeypatch):
    monkeypatch.setattr(torc, "execute", lambda argv: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli("ping")[0] == 130
    script = f"{PYTHON} {TORC} completions bash | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.stderr == "" and result.stdout == "_torc() {\n"
    assert result.returncode in (0, 141)


def test_commands_work_on_a_server_as_on_a_file(cli, server):
    client = server.client()
    make(client, {"a": [], "b": ["a"]})
    client.close()
    answer = cli_json(cli, "--url", server.url, "jobs", "list", 1)
    assert [job["name"] for job in answer["jobs"]] == ["a", "b"]
    assert cli("ping", "--url", server.url, ok=0)[1] == "Server is running\n"
    code, _, err = cli("--url", "http://127.0.0.1:9", "ping")
    assert code == 1 and "no server answers" in err


# ==================================================================================================
# The dashboard, as a browser and as others meet it
# ==================================================================================================

class Dash:
    """A real `torc dash` process and requests to it."""

    def __init__(self, directory, *options, env=None):
        self.log = directory / "dash.log"
        self.cookie = None
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "dash", *map(str, options)], cwd=directory, stdout=log, stderr=log,
                env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL)
        until(lambda: "TORC_DASH_" in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def link(self):
        """The latest link that lets a browser in."""
        return re.findall(r"\S*/\?token=\S+", self.log.read_text())[-1]

    def ask(self, path, method="GET", body=None, headers=None, url=None):
        """(status, headers, body) of a request without following redirects."""
        from urllib.parse import urlsplit
        port = re.search(r"TORC_DASH_PORT=(\d+)", self.log.read_text())
        parts = urlsplit(url or f"http://127.0.0.1:{port[1]}")
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        sent = {"Cookie": self.cookie or "", "Origin": f"http://{parts.netloc}", **(headers or {})}
        connection.request(method, path, body, {name: value for name, value in sent.items() if value})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, dict(answer.headers), data

    def enter(self, headers=None):
        """Use the link, and keep the cookie."""
        status, headers, body = self.ask("/?" + self.link().partition("/?")[2], headers=headers)
        assert status == 200 and b"url=./'" in body
        self.cookie = headers["Set-Cookie"].partition(";")[0]
        return headers["Set-Cookie"]

    def json(self, path, body=None):
        """The JSON of a good answer."""
        status, _, data = self.ask(path, "POST" if body is not None else "GET",
                                   None if body is None else json.dumps(body))
        assert status == 200, (path, status, data)
        return json.loads(data)

    def stop(self):
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(30)


@pytest.fixture
def dash(server, tmp_path):
    """A dashboard of `server`."""
    dash = Dash(tmp_path, "--port", 0, "--url", server.url)
    yield dash
    assert dash.stop() == 0


def test_too_many_streams_end_the_oldest_of_them(dash, server):
    workflow_id, _ = make(server.client(), {"a": []})     # jupyter-server-proxy never closes one
    dash.enter()
    from urllib.parse import urlsplit

    def follow():
        connection = http.client.HTTPConnection(urlsplit(dash.link()).netloc, timeout=30)
        connection.request("GET", f"{API}/workflows/{workflow_id}/events/stream", headers={"Cookie": dash.cookie})
        answer = connection.getresponse()
        assert answer.status == 200 and answer.readline() == b": live\n"
        assert "no-transform" in answer.headers["Cache-Control"]
        return answer

    oldest, *others = [follow() for _ in range(3 * torc.DASH_STREAMS)]
    while oldest.read1():
        pass                              # until it ends
    for answer in others[-torc.DASH_STREAMS:]:
        assert answer.readline() == b"\n" and answer.readline() == b": quiet\n"


def test_a_link_lets_one_browser_in_once(dash):
    link = dash.link()
    for path in ("/dash.js", "/torc-service/v1/ping", "/dash/user"):
        assert dash.ask(path)[0] == 401
    assert dash.ask("/")[0] == 403 and dash.ask("/?token=wrong")[0] == 403
    attributes = dash.enter()
    assert "HttpOnly" in attributes and "SameSite=Strict" in attributes
    status, headers, body = dash.ask("/")
    assert status == 200 and body.decode() == torc.DASH_HTML
    assert headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert dash.ask("/", headers={"If-None-Match": headers["Etag"]})[0] == 304
    assert dash.json("/torc-service/v1/ping") == {"status": "ok"}
    cookie, dash.cookie = dash.cookie, None
    assert dash.ask("/?" + link.partition("/?")[2])[0] == 403    # used
    until(lambda: dash.link() != link)
    dash.enter()
    assert dash.cookie == cookie


def test_another_programs_cookie_is_no_error_and_shows_no_secret(dash):
    dash.enter()
    status, _, body = dash.ask("/dash/user", headers={"Cookie": f"x=caf\xe9; {dash.cookie}"})
    assert status == 200
    assert dash.ask("/dash/user", headers={"Host": "caf\xe9"})[0] == 403
    assert dash.ask("/dash/user", headers={"Host": "caf\xe9", "Origin": ""})[0] == 401
    assert dash.cookie.partition("=")[2] not in dash.log.read_text()


def test_a_machine_without_ipv6_says_so(monkeypatch):
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    for one in torc.bind_sockets("::", 0):        # or it is refused in one sentence
        one.close()


@pytest.mark.parametrize("headers, status", [
    ({"Host": "evil.example", "Origin": "http://evil.example"}, 401),
    ({"Host": "localhost.evil.example:8090", "Sec-Fetch-Site": "same-origin"}, 401), ({}, 200),
    ({"Host": "evil.example"}, 403), ({"X-Forwarded-Host": "evil.example"}, 403),
    ({"Host": "127.0.0.1:9"}, 403), ({"Origin": "http://127.0.0.1:9"}, 403),
    ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": ""}, 403),
    ({"Origin": "", "Sec-Fetch-Site": "same-origin"}, 200), ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Origin": "", "Sec-Fetch-Site": "same-site"}, 403)])
def test_other_sites_cannot_make_a_browser_act(dash, headers, status):
    dash.enter()
    assert dash.ask("/dash/validate", "POST", '{"spec": ""}', headers)[0] == status


@pytest.mark.parametrize("path, headers, status", [
    ("/dash/user", {"Sec-Fetch-Site": "cross-site"}, 403), ("/dash/user", {"Sec-Fetch-Site": "none"}, 200),
    ("/", {"Sec-Fetch-Site": "cross-site"}, 200), ("/dash/user", {"Origin": "http://[", }, 403),
    ("/dash/user", {"Host": "[::1"}, 403), ("/dash/user", {"Host": "[::1", "Origin": ""}, 401)])
def test_other_sites_lead_to_the_dashboard_and_no_further(dash, path, headers, status):
    dash.enter()
    assert dash.ask(path, "GET", None, headers)[0] == status


# ---- behind a proxy

SEEN = {"Host": "hub.example.org", "Origin": "https://hub.example.org"}


@pytest.mark.parametrize("seen", [SEEN, {**SEEN, "Host": "node7:8090", "X-Forwarded-Host": "hub.example.org"},
                                  {**SEEN, "Host": "localhost:8090", "Sec-Fetch-Site": "same-origin"}])
def test_the_host_at_which_the_link_was_opened_counts_from_then_on(dash, seen):
    assert "Path" not in dash.enter(seen)                 # a browser takes that of the page
    assert dash.ask("/dash/validate", "POST", '{"spec": ""}', seen)[0] == 200
    assert dash.ask("/dash/validate", "POST", '{"spec": ""}', {**seen, "Sec-Fetch-Site": "same-site"})[0] == 403
    other = {"Host": "other.example.org", "Origin": "https://other.example.org"}
    for headers in (other, {}, {**seen, "X-Forwarded-Host": "other.example.org", "Origin": ""}):
        assert dash.ask("/dash/user", "GET", None, headers)[0] == 401, headers
        assert dash.ask(f"{API}/workflows/1/events/stream", "GET", None, headers)[0] == 401


def test_a_proxy_that_hides_the_host_is_told_what_it_lacks(dash):
    dash.enter({"Host": "localhost:8090"})
    status, _, body = dash.ask("/dash/validate", "POST", '{"spec": ""}', {"Host": "localhost:8090", "Origin": "http://p.example"})
    assert status == 403
    assert "came from http://p.example to localhost:8090 (a proxy must pass on Host or X-Forw" in body.decode()


@pytest.mark.parametrize("words, env, link, kept", [
    (["--base-path", "/node/n1/{port}/"], {}, "/node/n1/PORT", ["/node/n1/PORT"]),
    (["--base-path", "https://ood.example.org/rnode/n1"], {}, "https://ood.example.org/rnode/n1", ["/rnode/n1"]),
    ([], {"JUPYTERHUB_SERVICE_PREFIX": "/user/a%40b/"}, "/user/a%40b/proxy/PORT",
     ["/user/a%40b/proxy/PORT", "/user/a%2540b/proxy/absolute/PORT"]),
    ([], {}, "http://127.0.0.1:PORT", [])])
def test_requests_work_with_the_prefix_of_a_proxy_and_without_it(server, tmp_path, words, env, link, kept):
    dash = Dash(tmp_path, "--port", 0, "--url", server.url, *words, env=env)
    port = re.search(r"TORC_DASH_PORT=(\d+)", dash.log.read_text())[1]
    said = r"(?m): " + re.escape(link.replace("PORT", port)) + r"/\?token=[\w-]+" + (
        "" if ":" in link else r" \(after the host name of JupyterHub or the proxy\)") + "$"
    assert re.search(said, dash.log.read_text())
    dash.enter()
    prefixes = [(prefix.replace("PORT", port), {}) for prefix in kept]
    for prefix, headers in (("", {}), ("/x/y", {"X-Forwarded-Prefix": "/x/y"}), *prefixes):
        assert dash.ask(f"{prefix}/", headers=headers)[2].decode() == torc.DASH_HTML
        assert dash.ask(f"{prefix}{API}/ping", headers=headers)[0] == 200
        assert dash.ask(f"{prefix}/dash/validate", "POST", '{"spec": ""}', headers)[0] == 200
        assert dash.ask(f"{prefix}x/dash/user", headers=headers)[0] == 404
        if prefix:
            status, answered, _ = dash.ask(f"{prefix}?token=x", headers=headers)
            assert (status, answered["Location"]) == (302, "./" + prefix.rpartition("/")[2] + "/?token=x")
    assert dash.stop() == 0


def test_a_base_path_that_leads_to_another_program_is_refused(server, tmp_path, cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["dash", "--url", server.url, "--port", str(port), "--base-path"]
        said = cli(*words, f"/node/n1/{port}", ok=1)[2]
        assert f"port {port} is in use" in said and f"write {{port}} for its number in --base-path /node/n1/{port}" in said
        dash = Dash(tmp_path, *words[1:], "/node/n1/{port}")
        assert int(re.search(r"/node/n1/(\d+)/\?token", dash.log.read_text())[1]) > port
        assert dash.stop() == 0
    for bad in ("node/n1", "https://x", "/a?b", "ftp://x/y"):
        assert f"{bad!r} is not a path such as /node/login1/{{port}}" in cli("dash", "--base-path", bad, ok=2)[2]


@pytest.mark.parametrize("path, body, status, text", [
    ("/dash/validate", {"spec": 3}, 400, "/dash/validate cannot use this"),
    ("/dash/validate", [], 400, "not a JSON object"), ("/dash/create", {}, 400, "/dash/create cannot use this"),
    ("/dash/open", {"path": "/dev/zero"}, 400, "/dev/zero is not a file")])
def test_what_the_dashboard_cannot_use_is_no_defect_of_its_own(dash, path, body, status, text):
    dash.enter()
    answer = dash.ask(path, "POST", json.dumps(body), {"Sec-Fetch-Site": "same-origin"})
    assert answer[0] == status and text in str(answer)


def test_a_refused_submission_does_not_say_that_the_server_is_away(dash, server):
    dash.enter()
    workflow_id = two_allocations(server.client())
    answer = dash.ask("/dash/do/submit?dry_run=true", "POST", json.dumps({"workflow_id": workflow_id}),
                      {"Sec-Fetch-Site": "same-origin"})
    assert answer[0] == 422 and "listens on this machine only" in str(answer)


@pytest.mark.parametrize("body", ['{"workflow_id": 1, "name": "u", "data": {"loss": NaN}}',
                                  '{"workflow_id": 1, "name": "f", "path": "p", "st_mtime": 1e999}'])
def test_numbers_that_json_does_not_have_are_refused(server, body):
    make(server.client(), {"a": []})
    path = "/files" if "path" in body else "/user_data"
    status, _, text = raw(server, "POST", API + path, body, **{"Content-Type": "application/json"})
    assert status in (400, 422) and re.search("NaN is not JSON|inf is not a number", text), text


def test_a_log_is_handed_on_in_whole_letters(tmp_path):
    path = tmp_path / "log"
    seen, offset = "", 0
    for part in ("größe 1".encode()[:3], "größe 1".encode()[3:], b" \x1b[3", b"1mred\x1b[0m\r", "\nend €".encode()):
        with open(path, "ab") as file:
            file.write(part)
        answer = torc.log_part(path, offset)
        seen, offset = seen + answer["text"], answer["size"]
    assert seen == "größe 1 red\nend €" and offset == path.stat().st_size


def test_the_dashboard_has_the_checks_of_the_doctor(dash, server):
    dash.enter()
    checks = {check["check"]: check for check in dash.json("/dash/doctor")["checks"]}
    assert "a Torc server, id " in checks[torc.Client(server.url).where]["detail"]
    assert checks["credentials"]["verdict"] == checks["output directory"]["verdict"] == "ok"
    assert (checks["workers"]["verdict"], checks["workers"]["detail"]) == (
        "warn", "on compute nodes cannot reach the server")
    assert "--host 0.0.0.0" in checks["workers"]["next_step"]


def test_the_dashboard_runs_a_workflow_from_its_text_to_its_output(dash, server, tmp_path):
    dash.enter()
    bad = dash.json("/dash/validate", {"spec": "name: x\njobs:\n  - name: a\n    comand: c\n"})
    assert bad["problems"][0] == "spec.yaml line 4: job \"a\": unknown field 'comand' (did you mean \"command\"?)"
    spec = json.dumps({"name": "mine", "parameters": {"i": "0:1"}, "jobs": [{
        "name": "mine_{i}", "use_parameters": ["i"], "command": "echo {i}; echo no >&2; exit {i}"}]})
    assert dash.json("/dash/validate", {"spec": spec})["summary"]["job_count"] == 2
    made = dash.json("/dash/create", {"spec": spec})["id"]
    do = lambda verb, dry=True, **more: dash.json(  # noqa: E731
        f"/dash/do/{verb}" + ("?dry_run=true" if dry else ""), {"workflow_id": made, **more})
    assert do("initialize") == {} and "2 jobs ready" in do("initialize", False)["message"]
    started = do("run", False)
    client = server.client()
    until(lambda: client.get(f"/workflows/{made}/is_complete")["is_complete"])
    until(lambda: "ended with failures" in dash.json(f"/dash/log?log={started['log']}")["text"])
    [job] = client.items("/jobs", workflow_id=made, status="failed")
    assert dash.json(f"/dash/log?job={job['id']}&stream=stderr&offset=0") == {
        "text": "no\n", "from": 0, "size": 3}
    plan = do("rerun")
    assert plan["choices"][0][1] == "reset 1 job" and "mine_1" in plan["lines"][0]
    assert statuses(client, made)["mine_1"] == "failed"
    do("rerun", False)
    assert statuses(client, made)["mine_1"] == "ready"
    assert "No jobs are running" in do("cancel")["lines"][0] and "Canceled" in do("cancel", False)["message"]
    assert do("delete")["typed"] == "mine" and do("delete", False)["gone"] == [made]
    assert dash.ask("/dash/do/nothing", "POST", "{}")[0] == 404
    assert dash.ask(f"/dash/do/delete?workflow_id={made}")[0] == dash.ask("/dash/create?spec=x")[0] == 404


def test_output_of_jobs_is_shown_without_control_codes():
    assert torc.readable_text(b"\x1b[31mred\x1b[0m\r\n\x1b]0;title\x07a\x00b\tc\xff") == "red\nab\tc\ufffd"


def test_a_log_leads_nowhere_else(dash, server, tmp_path):
    spec = write_spec(tmp_path, {"a": "echo mine"})
    assert start_run(tmp_path, spec, "--url", server.url).wait(30) == 0
    dash.enter()
    path = tmp_path / "torc_output" / "job_stdio" / "job_wf1_j1_r1_a1.o"
    assert dash.json("/dash/log?job=1&stream=stdout")["text"] == "mine\n"
    secret = tmp_path / "secret"
    secret.write_text("nobody's business")
    path.unlink()
    path.symlink_to(secret)
    status, _, body = dash.ask("/dash/log?job=1&stream=stdout")
    assert status == 403 and b"leads out of the output directory" in body


def test_a_busy_port_is_passed_over_and_said(tmp_path, server):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        dash = Dash(tmp_path, "--port", port, "--url", server.url)
        assert f"port {port} is in use" in dash.log.read_text()
        dash.enter()
        assert dash.stop() == 0


def test_a_server_that_goes_away_is_told_as_such(dash, server):
    dash.enter()
    server.stop()
    status, _, body = dash.ask("/torc-service/v1/workflows")
    assert status == 502 and b"no server answers at" in body


def test_a_dashboard_of_a_database_takes_no_server_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TORC_API_URL", "http://127.0.0.1:1/torc-service/v1")
    started = []
    monkeypatch.setattr(torc, "start_own_server", lambda args, say: (
        started.append(args.database), ("process", "http://127.0.0.1:2/torc-service/v1", None))[1])
    database = tmp_path / "x.db"
    database.touch()
    args = torc.parse_command(torc.COMMANDS["dash"], ["--database", str(database)], [])
    client, process = torc.dash_client(args, print)
    assert (client.address.port, process) == (2, "process")
    assert started == [str(database)]


@pytest.mark.slow
def test_a_standalone_dashboard_keeps_a_password_and_leaves_nothing_running(tmp_path, cli):
    dash = Dash(tmp_path, "--standalone", "--port", 0, "--server-host", "127.0.0.1")
    said = dash.log.read_text()
    home = Path.home()
    assert str(home / ".local/share/torc/torc.db") in said
    password = home / ".torc" / "dash" / "password"
    assert password.stat().st_mode & 0o077 == 0 and password.read_text().strip() not in said
    dash.enter()
    [note] = (home / ".torc" / "servers").iterdir()
    told = json.loads(note.read_text())
    assert dash.json("/torc-service/v1/server_info")["auth_required"]
    assert cli("ping", "--url", told["urls"][0])[0] == 0       # the password is found by itself
    assert dash.stop() == 0
    until(lambda: torc.process_start(told["pid"]) is None)
    again = Dash(tmp_path, "--standalone", "--port", 0, "--server-host", "127.0.0.1")
    [note] = (home / ".torc" / "servers").iterdir()
    pid = json.loads(note.read_text())["pid"]
    again.process.kill()                  # even then
    again.process.wait()
    until(lambda: torc.process_start(pid) is None)


@pytest.mark.parametrize("kind", ["server", "dash"])
def test_signals_in_a_row_end_it_once(tmp_path, kind):
    torc.LocalClient(str(tmp_path / "x.db")).close()
    one = Server(tmp_path / "x.db") if kind == "server" else Dash(
        tmp_path, "--port", 0, "--database", tmp_path / "x.db")
    for number in [signal.SIGTERM, signal.SIGHUP, signal.SIGINT] * 20:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.process.pid, number)
    code, said = one.stop() if kind == "server" else (one.stop(), one.log.read_text())
    # The interpreter has no handlers any more when it is about to end.
    assert code in (0, -15, -1, -2) and "Traceback" not in said, (code, said)
    assert "INFO    stopped" in said


@pytest.mark.parametrize("options, env, said", [
    (["--no-auth"], {}, "whoever reaches the server's port can read and change all workflows"),
    (["--auth-file", "users", "--require-auth"], {"TORC_USERNAME": "ann", "TORC_PASSWORD": PASSWORD}, ""),
    (["--auth-file", "users", "--require-auth"], {}, None)])
def test_a_standalone_dashboard_takes_other_passwords_or_none(tmp_path, cli, options, env, said):
    subprocess.run([*COMMAND, "htpasswd", "add", "--file", tmp_path / "users", "--password-stdin",
                    "--cost", "5", "ann"], input=PASSWORD, text=True, check=True)
    words = ["--standalone", "--port", 0, "--server-host", "127.0.0.1", "--database", "x.db", *options]
    if said is None:
        with pytest.raises(AssertionError, match="requires a user name and password: set TORC_PASSWORD"):
            Dash(tmp_path, *words, env=env)
        return
    dash = Dash(tmp_path, *words, env=env)
    dash.enter()
    info = dash.json("/torc-service/v1/server_info")
    assert info["auth_required"] == bool(env) and said in dash.log.read_text()
    code, _, err = cli("workflows", "list", "--url", info["urls"][0] if info["urls"] else re.search(
        r"the dashboard of (\S+):", dash.log.read_text())[1])
    assert (code, "requires a user name" in err) == ((1, True) if env else (0, False))
    assert not (Path.home() / ".torc" / "dash" / "password").exists()
    assert dash.stop() == 0


def test_a_database_is_served_once(server, tmp_path):
    done = subprocess.run([*COMMAND, "server", "run", "--port", "0", "--database", server.database], text=True,
                          capture_output=True, timeout=30, cwd=tmp_path)
    assert done.returncode == 1
    assert f"is served already (pid {server.process.pid}, at http://127.0.0.1:{server.port}/" in done.stderr


@pytest.mark.parametrize("words", [[], ["--standalone"]])
def test_another_dashboard_of_a_database_uses_the_server_that_there_is(tmp_path, monkeypatch, cli, words):
    make(torc.LocalClient(str(tmp_path / "x.db")), {"a": []})
    dashes = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        dashes.append(Dash(tmp_path / str(number), "--port", 0, "--server-host", "127.0.0.1", "--database",
                           "../x.db", *words))
    said = dashes[0].log.read_text()
    url = re.search(r"other commands use that server after: export TORC_API_URL=(\S+)\n", said)[1]
    assert dashes[1].enter() and f"the dashboard of {url}" in dashes[1].log.read_text()
    monkeypatch.setenv("TORC_API_URL", url)
    assert cli_json(cli, "workflows", "list")["workflows"][0]["name"] == "test"
    assert [dash.stop() for dash in reversed(dashes)] == [0, 0]
    assert torc.server_of("x.db") == {}


def test_of_two_servers_that_start_at_once_one_serves(tmp_path):
    words = [*COMMAND, "server", "run", "--port", "0", "--database", str(tmp_path / "x.db")]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        lines = [process.stdout.readline() for process in both]
        assert sorted(bool(line) for line in lines) == [False, True]
        loser = both[lines.index("")]
        assert "is served already" in loser.communicate(timeout=20)[1] and loser.returncode == 1
    finally:
        for process in both:
            process.terminate()
            process.communicate(timeout=20)


def test_a_note_whose_pid_another_program_has_now_keeps_nobody_from_starting(tmp_path):
    store = torc.Store(str(tmp_path / "x.db"))
    server_id = store.id
    store.close()
    other = subprocess.Popen([PYTHON, "-c", "import time; time.sleep(60)  # a server"])
    path = Path(torc.server_note(server_id))
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"id": server_id, "urls": ["http://127.0.0.1:1"], "pid": other.pid,
                                "host": socket.gethostname(), "database": str(tmp_path / "x.db")}))
    try:
        with Server(tmp_path / "x.db").closing() as server:
            assert server.client().get("/ping") == {"status": "ok"}
    finally:
        other.kill(), other.wait()


def test_a_database_is_served_once_whatever_link_leads_to_it(server, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    done = subprocess.run([*COMMAND, "server", "run", "--port", "0", "--database", "server.db"], text=True,
                          capture_output=True, timeout=30, cwd=tmp_path / "link")
    named = subprocess.run([*COMMAND, "server", "run", "--port", "0", "--database", "link/server.db"],
                           text=True, capture_output=True, timeout=30, cwd=tmp_path)
    for end in (done, named):
        assert end.returncode == 1 and "is served already" in end.stderr


def test_an_exported_workflow_is_imported_by_the_dashboard(dash, server):
    dash.enter()
    client = server.client()
    make(client, {"a": [], "b": ["a"]})
    text = json.dumps(dash.json("/dash/export?workflow_id=1"), indent=1)
    assert dash.json("/dash/validate", {"spec": text}) == {"problems": [], "exported": 2}
    made = dash.json("/dash/create", {"spec": text})["id"]
    assert set(statuses(client, made)) == {"a", "b"}


@pytest.mark.parametrize("block", [5, 64, 2**20])
def test_words_are_found_in_the_whole_of_a_log(tmp_path, block):
    path = tmp_path / "log"
    path.write_text("first needle\n" + "filler line\n" * 20_000 + "the last needle\n" + "z" * 100_000)
    found = torc.log_found(str(path), "needle", block)
    assert "the last needle" in found["text"] and "first needle" not in found["text"]
    assert found["size"] == path.stat().st_size and found["from"] > 200_000
    assert torc.log_found(str(path), "first needle", block)["from"] == 0
    assert torc.log_found(str(path), "nowhere", block)["text"] == ""
    assert torc.log_found(str(tmp_path / "none"), "x")["size"] == 0


def test_a_local_database_is_shown_without_a_server(tmp_path, run):
    ran = run({"a": "true"})
    dash = Dash(tmp_path, "--port", 0, "--database", ran.client.path)
    dash.enter()
    assert dash.json("/torc-service/v1/workflows/1/counts")["completed"] == 1
    assert dash.stop() == 0


def socket_request(path, text):
    """The answer to a raw request over a UNIX socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(text.encode())
        data = b""
        while part := sock.recv(65536):
            data += part
        return data.decode()


def test_a_socket_is_for_its_user_alone_from_the_first_instant(tmp_path, server, request):
    folder = Path(tempfile.mkdtemp(dir="/tmp"))       # unix(7) takes 107 bytes
    request.addfinalizer(lambda: shutil.rmtree(folder))
    path = folder / "dash.sock"
    dash = Dash(tmp_path, "--socket", path, "--url", server.url)
    assert path.stat().st_mode & 0o777 == 0o600
    assert re.search(rf"ssh -L 8090:{path} tester@\S+, then open http://localhost:8090/",
                     dash.log.read_text())
    answer = socket_request(path, "GET / HTTP/1.1\r\nHost: localhost:8090\r\nConnection: close\r\n\r\n")
    assert answer.startswith("HTTP/1.1 200") and answer.endswith(torc.DASH_HTML)
    answer = socket_request(path, "GET / HTTP/1.1\r\nHost: evil.example:8090\r\nX-Forwarded-Host: localhost\r\n"
                                  "Connection: close\r\n\r\n")     # a rebound name's page may send that
    assert answer.startswith("HTTP/1.1 403")
    with pytest.raises(torc.Unreachable, match="a dashboard listens on .* already"):
        torc.private_socket(str(path))
    assert dash.stop() == 0 and not path.exists()
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()                          # what a killed dashboard leaves
    torc.private_socket(str(path)).close()
    path.unlink()
    path.write_text("a file")
    with pytest.raises(torc.Unreachable, match="is not a socket of yours"):
        torc.private_socket(str(path))
    assert path.read_text() == "a file"


def test_the_pages_name_no_other_place_and_write_text_only():
    text = torc.DASH_HTML + torc.DASH_CSS + torc.DASH_JS
    urls = set(re.findall(r"https?://[\w.]+", text))
    assert urls <= {"http://www.w3.org"}, urls
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "<style",
                 " style=\"", "onclick=\""):
        assert word not in text, word
    if shutil.which("node"):
        done = subprocess.run(["node", "--check", "-"], input=torc.DASH_JS, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr


# ---- in Chromium

CHROMIUM = "/usr/bin/chromium"
CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                    "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def chromium():
    """A browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"there is no {CHROMIUM}")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


class Visit:
    """A page of the dashboard; what should not happen is gathered in .trouble."""

    def __init__(self, chromium, dash, width=1280, height=800, scheme="light", link=None):
        self.context = chromium.new_context(viewport={"width": width, "height": height},
                                            color_scheme=scheme)
        self.page = self.context.new_page()
        self.trouble = []
        link = link or dash.link()
        base = link.partition("/?")[0]
        self.page.on("console", lambda message: message.type == "error"
                     and self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: request.url.startswith((base, "data:"))
                     or self.trouble.append(request.url))
        self.page.goto(link)
        self.page.wait_for_selector("header.top")        # the link leads there by itself

    def go(self, path, see=None):
        """Another page by its address; waits until it has content, and for a text."""
        self.page.evaluate("path => { location.hash = path; }", path)
        self.page.wait_for_function(
            "path => location.hash === '#' + path && !document.querySelector('#main').textContent"
            ".includes('Loading') && document.querySelector('#main').textContent.length > 10", arg=path)
        self.see(see)

    def see(self, text):
        """Wait for a text, if it is not None."""
        if text is not None:
            self.page.get_by_text(text).first.wait_for(timeout=20_000)

    def menu(self, name, see=None):
        """Choose an entry of the workflow's menu, and wait for a text."""
        self.page.locator("details.menu summary").first.click()
        self.page.locator("details.menu").get_by_role("button", name=name).first.click()
        self.see(see)

    def click(self, name, see=None):
        """Press a button by its name, and wait for a text."""
        self.page.get_by_role("button", name=name, exact=True).first.click()
        self.see(see)


BROWSER_SPEC = """\
name: seen
resource_requirements:
  - {name: r, num_cpus: 1, memory: 100m, runtime: PT1M}
jobs:
  - {name: prep, command: "echo preparing; seq 30000; sleep 1", resource_requirements: r}
  - {name: a_1, command: "echo one; sleep 1", depends_on: [prep], resource_requirements: r}
  - {name: a_2, command: "echo no such mesh >&2; exit 3", depends_on: [prep], resource_requirements: r}
  - {name: merge, command: "true", depends_on: [a_1, a_2]}
"""
DASH_PLACES = ("/", "/network", "/w/1", "/w/1/jobs", "/w/1/graph", "/w/1/timeline", "/w/1/resources",
               "/w/1/failures", "/w/1/nodes", "/w/1/events", "/w/1/data", "/w/1/jobs/3")


@pytest.mark.browser
def test_a_browser_takes_a_workflow_from_upload_to_its_end(chromium, dash, server, tmp_path):
    visit = Visit(chromium, dash)
    page = visit.page
    visit.see("No workflows yet")
    visit.click("New workflow")
    page.get_by_role("button", name="Upload").click()
    spec = tmp_path / "seen.yaml"
    spec.write_text(BROWSER_SPEC.replace("depends_on: [a_1, a_2]", "depends_on: [a_9]"))
    page.get_by_label("Specification file").set_input_files(str(spec))
    visit.see("1 problem")
    assert page.get_by_role("button", name="Create", exact=True).is_disabled()
    page.get_by_label("Specification", exact=True).fill(BROWSER_SPEC)
    visit.see("Valid: 4 jobs")
    visit.click("Create", see="not initialized")
    visit.click("Initialize", see="1 job ready")
    visit.click("Run here…", see="Closing this window does not stop the runner.")
    visit.see("ended with failures")
    page.get_by_role("button", name="Close").last.click()
    visit.see("4 of 4 jobs done")         # live, without a reload
    visit.go("/w/1/jobs/1")               # a search goes through the whole of a long log
    page.get_by_label("Find in output").fill("preparing")
    visit.see("not in this part: Enter searches all")
    page.keyboard.press("Enter")
    visit.see("1 of 1")
    page.reload()                         # nor is what was before it lost
    visit.go("/w/1", see="a_2 failed: exit 3")
    for place in ("/w/1/jobs", "/w/1", "/w/1/events"):
        visit.go(place)
    visit.see("a_2 failed: exit 3")
    assert page.locator("main tbody").get_by_text("a_2 failed: exit 3").count() == 1
    visit.go("/w/1/graph")
    page.get_by_text("a_2").first.click()
    page.wait_for_function("() => location.hash.includes('/jobs/3')")
    visit.see("no such mesh")
    visit.click("Rerun job…", see='Run job 3 "a_2" again?')
    visit.click("Keep as it is")
    visit.go("/w/1")
    visit.click("Rerun failed…", see="a_2 (failed): it failed")
    visit.click("Reset 2 jobs")
    client = server.client()
    until(lambda: statuses(client, 1)["a_2"] == "ready")
    visit.click("Run here…", see="ended with failures")
    page.get_by_role("button", name="Close").last.click()
    until(lambda: [row["run_id"] for row in client.items("/results", workflow_id=1, all_runs=True)
                   if row["return_code"] == 3] == [1, 2])
    visit.menu("Reset…", see="prep (completed): all jobs are reset")
    visit.click("Reset 4 jobs")
    until(lambda: set(statuses(client, 1).values()) == {"uninitialized"})
    visit.click("Initialize")             # live: the button of the state that it is in now
    until(lambda: statuses(client, 1)["prep"] == "ready")
    visit.menu("Delete…")
    page.get_by_label("Type seen").fill("seen")
    visit.click("Delete 1 workflow")
    until(lambda: not list(client.items("/workflows")))
    visit.see("No workflows yet")
    assert visit.trouble == []


@pytest.mark.browser
def test_what_is_chosen_is_named_first_and_an_empty_page_leads_to_the_last(chromium, dash, server):
    client = server.client()
    for number in range(51):
        client.post("/workflows", {"name": f"w{number:02}", "user": "tester"})
    long = client.post("/workflows", {"name": "x" * 3000, "user": "tester"})["id"]
    empty = client.post("/workflow_specs", {"workflow": {"name": "empty", "user": "tester"}, "jobs": []})["id"]
    client.post(f"/workflows/{empty}/initialize_jobs")
    client.put(f"/workflows/{empty}/status", {**client.get(f"/workflows/{empty}/status"), "run_id": 1})
    visit = Visit(chromium, dash)
    visit.go(f"/w/{long}", see="xxx")
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 1280
    visit.go(f"/w/{empty}")
    visit.page.wait_for_function("() => /State\\s+done/.test(document.querySelector('main').innerText)")
    visit.see("no jobs")
    visit.go("/", see="1–50 of 53")
    client.delete(f"/workflows/{long}")
    client.delete(f"/workflows/{empty}")
    visit.go("/?page=2")
    visit.page.get_by_label("Select w00").check()
    visit.click("Delete…")
    visit.page.get_by_label("Type w00").fill("w00")
    visit.click("Delete 1 workflow", see="1–50 of 50")
    visit.page.get_by_label("Select w50").check()
    visit.see("1 workflow")
    visit.page.get_by_label("Filter workflows").fill("w11")
    visit.see("1–1 of 1")
    visit.click("Archive")                # what the filter hides is chosen still, and that is said
    visit.see('"w50"?')
    visit.click("Keep as it is")
    assert visit.trouble == []


@pytest.mark.browser
def test_a_browser_exports_reinitializes_cancels_and_archives(chromium, dash, server, tmp_path):
    client, workflow_id = server.client(), 1
    (tmp_path / "raw.csv").write_text("1")
    (tmp_path / "w.json").write_text(json.dumps({
        "name": "w", "files": [{"name": "raw", "path": "raw.csv"}], "jobs": [
            {"name": "a", "command": "true", "input_files": ["raw"]},
            {"name": "b", "command": "true", "depends_on": ["a"]}]}))
    assert start_run(tmp_path, "w.json", "--url", server.url).wait(60) == 0
    visit = Visit(chromium, dash)
    visit.go(f"/w/{workflow_id}")
    with visit.page.expect_download() as download:
        visit.menu("Export")
    document = json.loads(Path(download.value.path()).read_text())
    assert [job["name"] for job in document["jobs"]] == ["a", "b"]
    visit.menu("Reinitialize…", see="Nothing has changed in workflow 1, so no job runs again")
    (tmp_path / "raw.csv").write_text("other")
    visit.menu("Reinitialize…", see='a (completed): its input file "raw.csv" changed')
    visit.click("Keep as it is")
    visit.menu("Reset…")
    visit.click("Reset 2 jobs")
    visit.click("Initialize", see="1 job ready")
    visit.menu("Cancel…", see="No jobs are running.")
    visit.click("Cancel the workflow")
    until(lambda: client.get(f"/workflows/{workflow_id}/counts")["is_canceled"])
    visit.go(f"/w/{workflow_id}/graph")
    visit.click("Files and user data")
    visit.page.locator("svg").get_by_text("raw", exact=True).wait_for()
    visit.go(f"/w/{workflow_id}")
    visit.menu("Archive", see="brings it back")
    visit.page.locator("dialog").get_by_role("button", name="Archive").click()
    until(lambda: client.get(f"/workflows/{workflow_id}/status")["is_archived"])
    visit.go("/", see="No workflows yet")
    assert visit.trouble == []


@pytest.mark.browser
def test_a_report_opens_from_a_file_without_a_network(chromium, dash, server, tmp_path):
    client, number = server.client(), 2005
    workflow_id = client.post("/workflow_specs", {
        "workflow": {"name": "study", "user": "tester", "description": "</script><b>x</b>"},
        "jobs": [{"name": "fails", "command": "echo no such mesh >&2; exit 3"},
                 {"name": "never", "command": "true", "depends_on_job_ids": [1]},
                 *({"name": f"solve_{i:04}", "command": "true"} for i in range(number))]})["id"]
    assert start_run(tmp_path, workflow_id, "-j", 4, "--url", server.url).wait(120) == 1
    shown = Visit(chromium, dash)
    shown.go(f"/w/{workflow_id}")
    with shown.page.expect_download() as download:
        shown.menu("Report")
    path = tmp_path / "r.html"
    download.value.save_as(path)
    visit = Visit(chromium, None, link=f"file://{path}")
    visit.context.set_offline(True)
    page = visit.page
    visit.see("2,007 of 2,007 jobs done")
    visit.see("exit 3: no such mesh")
    assert page.locator("#link").inner_text().startswith("report of ")
    for path, text in (("jobs?status=failed", "1–1 of 1"), ("jobs?family=solve", "1–50 of 2,005"),
                       ("jobs?q=solve_2004", "1–1 of 1"), ("jobs/1", "no such mesh"), ("jobs/3", "completed"),
                       ("graph", "solve_*"), ("timeline", "Longest gap"), ("resources", "Requested and used"),
                       ("failures", "1 dependent was canceled"), ("nodes", "0 active"), ("events", "solve_2004 completed"),
                       ("data", "No files"), ("jobs/9999", "this report has no such job")):
        visit.go(f"/w/{workflow_id}/{path}", see=text)
        assert page.locator("[data-verb]:visible, .menu:visible, button:has-text('New workflow')").count() == 0, path
    visit.go(f"/w/{workflow_id}/timeline")
    for _ in range(8):                    # closer, until single jobs can be told apart
        visit.click("Zoom in")
    page.locator("a.run").first.wait_for()
    page.keyboard.press("c")
    page.keyboard.press("?")
    visit.see("previous, next page")
    assert page.get_by_text("New workflow").count() == 0
    assert shown.trouble == visit.trouble == []


@pytest.mark.browser
def test_a_browser_decides_on_failures_that_wait(chromium, dash, server):
    client = server.client()
    undecided(client, {"a": [], "b": ["a"]})
    visit = Visit(chromium, dash)
    visit.go("/w/1/failures")
    visit.click("Decide…", see='fail: Fail job 1 "a". Jobs that depend on this are canceled too')
    visit.click("Keep as it is")
    visit.go("/w/1/jobs/1", see="torc jobs resolve 1 retry")
    visit.click("Decide…", see='Decide on job 1 "a"?')
    visit.click("Run 1 job again")
    until(lambda: statuses(client, 1) == {"a": "ready", "b": "blocked"})


@pytest.mark.browser
def test_a_page_notices_what_was_rerun_elsewhere(chromium, dash, server):
    client = server.client()
    workflow_id, ids = make(client, {"a": [], "b": []})
    end_jobs(client, workflow_id, ids, a=1, b=1)
    visit = Visit(chromium, dash)
    visit.go(f"/w/{workflow_id}/jobs", see="failed")
    client.post(f"/workflows/{workflow_id}/rerun_jobs", {"jobs": [{"job_id": one} for one in ids.values()]})
    until(lambda: visit.page.locator("tbody").inner_text().count("ready") == 2)
    visit.go(f"/w/{workflow_id}/events", see="rerun jobs a and b")
    client.post(f"/jobs/{ids['a']}/stop", status="canceled")
    client.post(f"/jobs/{ids['a']}/rerun")
    visit.page.get_by_text("rerun jobs a", exact=True).wait_for()
    assert visit.page.get_by_text("rerun jobs a and b").count() == 1
    assert visit.trouble == []


@pytest.mark.browser
def test_a_browser_filters_sorts_turns_pages_and_deletes_several(chromium, dash, server, tmp_path):
    client = server.client()
    for name in ("alpha", "beta", "gamma"):
        make(client, {f"{name}_{number:03d}": [] for number in range(120 if name == "beta" else 2)})
        client.put(f"/workflows/{len(list(client.items('/workflows')))}", {"name": name})
    visit = Visit(chromium, dash)
    page = visit.page

    def names():
        return page.locator("main tbody th").all_inner_texts()

    def wait_for(rows):
        until(lambda: [text.split("\n")[0] for text in names()] == rows)

    wait_for(["gamma", "beta", "alpha"])
    page.get_by_role("button", name="Name", exact=True).click()
    wait_for(["alpha", "beta", "gamma"])
    page.get_by_label("Filter workflows").fill("bet")
    wait_for(["beta"])
    page.get_by_text("beta").first.click()
    visit.see("0 of 120 jobs done")
    page.keyboard.press("g")              # by keyboard to the jobs, and through them
    page.keyboard.press("j")
    visit.see("1–50 of 120")
    page.keyboard.press("]")
    visit.see("51–100 of 120")
    assert names()[0] == "beta_050" and "page=2" in page.url
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="beta_050").wait_for()
    page.go_back()
    visit.see("51–100 of 120")
    page.keyboard.press("/")
    page.keyboard.type("_11")
    wait_for([f"beta_11{number}" for number in range(10)])
    page.get_by_role("button", name="ready").first.click()
    until(lambda: "status=ready" in page.url and len(names()) == 10)
    visit.go("/")
    page.keyboard.press("?")
    visit.see("previous, next page")
    page.keyboard.press("Escape")
    page.get_by_label("Select alpha").check()
    page.get_by_label("Select gamma").check()
    visit.see("2 workflows")
    page.get_by_label("Filter workflows").fill("alp")
    wait_for(["alpha"])
    assert page.get_by_label("Select alpha").is_checked()      # and it is said that gamma is, too
    page.locator("span.tools").get_by_role("button", name="Delete…").click()
    visit.see("gamma")
    page.get_by_label("Type delete 2").fill("delete 2")
    page.get_by_role("button", name="Delete 2 workflows").click()
    until(lambda: [one["name"] for one in client.items("/workflows")] == ["beta"])
    page.get_by_label("Filter workflows").fill("")
    wait_for(["beta"])
    assert not page.locator("span.tools").get_by_text("2 workflows").count()
    for source, label, value in (("Server path", "Path on the server’s machine", str(tmp_path / "w.yaml")),
                                 ("Wizard", "Name", "wizard")):
        (tmp_path / "w.yaml").write_text("name: w\njobs:\n  - {name: a, command: 'true'}\n")
        visit.click("New workflow")
        visit.click(source)
        page.get_by_label(label).fill(value)
        page.get_by_role("button", name="Open" if source == "Server path" else
                         "Write the specification").click()
        visit.see("Valid: ")
        visit.click("Create")
        page.wait_for_url("**/#/w/*")
        visit.see("Initialize")
        visit.go("/")
    assert {one["name"] for one in client.items("/workflows")} == {"beta", "w", "wizard"}
    visit.go("/network", see="Checks of the server")
    assert visit.trouble == []


@pytest.mark.browser
@pytest.mark.parametrize("width, height, scheme", [(1280, 800, "light"), (1280, 800, "dark"),
                                                   (390, 844, "light")])
def test_every_page_is_drawn_without_an_error(chromium, dash, server, tmp_path, width, height, scheme):
    path = tmp_path / "seen.yaml"
    path.write_text(BROWSER_SPEC)
    assert start_run(tmp_path, path, "--url", server.url).wait(60) == 1
    visit = Visit(chromium, dash, width, height, scheme)
    axe = axe_source(tmp_path)
    for place in DASH_PLACES:
        visit.go(place)
        visit.page.screenshot(path=str(tmp_path / f"{scheme}_{width}{place.replace('/', '_')}.png"))
        assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), place
        if place == "/w/1/nodes":
            host = visit.page.locator("tbody .key").first
            assert host.bounding_box()["width"] > 80
        if place == "/w/1":               # times of events stay on one line
            visit.page.locator(".lines .num .muted").first.wait_for()
            heights = visit.page.evaluate("[...document.querySelectorAll('.lines .num')].map("
                                          "one => one.offsetHeight)")
            assert max(heights) < 30
        if axe:
            visit.page.evaluate(axe)      # a string: the pages' policy forbids inline scripts
            found = visit.page.evaluate("axe.run().then(found => found.violations.filter(one => "
                                        "/serious|critical/.test(one.impact)).map(one => one.id))")
            assert found == [], place
    assert visit.trouble == []
    if not axe:
        pytest.skip("drawn without an error; not checked for accessibility: there is no npm for axe-core")


AXE = {}


def axe_source(directory):
    """The text of axe-core, or "" where npm does not bring it."""
    if "text" not in AXE:
        AXE["text"] = ""
        if shutil.which("npm"):
            done = subprocess.run(["npm", "pack", "--silent", "axe-core@4"], cwd=directory, text=True,
                                  capture_output=True, timeout=120)
            if done.returncode == 0:
                import tarfile
                with tarfile.open(directory / done.stdout.split()[-1]) as archive:
                    AXE["text"] = archive.extractfile("package/axe.min.js").read().decode()
    return AXE["text"]


@pytest.mark.browser
def test_pages_say_what_has_changed_meanwhile(chromium, dash, server, tmp_path):
    client = server.client()
    workflow_id, ids = make(client, {"a": [], "b": []})
    visit = Visit(chromium, dash)
    page, asked = visit.page, []
    page.on("request", lambda request: asked.append(request.url))
    visit.go("/w/1/jobs?status=bogus")    # refused in plain text: said once
    visit.see("The server refused")
    assert sum("status=bogus" in url for url in asked) == 1
    assert "does not answer" not in page.locator("body").inner_text()
    visit.go(f"/w/1/jobs/{ids['a']}")
    node = make_node(client, workflow_id)
    client.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=1)
    client.put(f"/jobs/{ids['a']}/start_job/1/{node}")
    page.get_by_role("button", name="Cancel job…").wait_for()
    complete(client, ids["a"], workflow_id, node, code=3)
    page.get_by_role("button", name="Rerun job…").wait_for()
    page.locator("p.why").get_by_text("return code 3").wait_for()
    page.get_by_role("cell", name="exit 3").wait_for()
    client.delete(f"/workflows/{workflow_id}")
    visit.page.evaluate("refresh()")
    visit.see("Not found")
    visit.trouble[:] = [one for one in visit.trouble if "40" not in one]     # said of refusals
    assert visit.trouble == []


@pytest.mark.browser
def test_the_pages_fill_again_after_the_server_was_away(chromium, tmp_path):
    server = Server(tmp_path / "away.db")
    client = server.client()
    make(client, {"a": []})
    client.close()
    dash = Dash(tmp_path, "--port", 0, "--url", server.url)
    try:
        visit = Visit(chromium, dash)
        visit.go("/w/1", see="0 of 1 job done")
        server.stop()
        visit.page.locator("#banner").get_by_text("does not answer").wait_for(timeout=30_000)
        server = Server(tmp_path / "away.db", server.port)
        visit.page.wait_for_function("() => !document.querySelector('#banner').textContent",
                                     timeout=40_000)
        visit.see("0 of 1 job done")
    finally:
        dash.stop()
        server.stop()


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    """(URL, environment of what is started in it) of a Jupyter server with jupyter-server-proxy."""
    folder = tmp_path_factory.mktemp("jupyter")
    log = folder / "jupyter.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", "--allow-root", "--no-browser", "--ip=127.0.0.1", "--port=0",
             "--IdentityProvider.token=", "--ServerApp.base_url=/user/a%40b/", f"--ServerApp.root_dir={folder}",
             "--ServerApp.jpserver_extensions={'jupyter_server_proxy': True}"],
            env={**os.environ, "HOME": str(folder)}, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        until(lambda: "is running at" in log.read_text() or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        url = re.search(r"http://127\.0\.0\.1:\d+/user/\S+/", log.read_text())[0]
        yield url, {"JUPYTERHUB_SERVICE_PREFIX": "/user/a%40b/"}
    finally:
        process.terminate()
        process.wait(30)


class StrippingProxy(http.server.BaseHTTPRequestHandler):
    """A proxy as administrators make one: the prefix goes, and headers tell of it and of the host."""

    prefix, port = "/apps/torc", 0

    def do_GET(self):
        upstream = http.client.HTTPConnection("localhost", self.port)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        headers = dict(self.headers)
        headers.update({"X-Forwarded-Host": headers.pop("Host"), "X-Forwarded-Prefix": self.prefix})
        upstream.request(self.command, self.path.removeprefix(self.prefix), body, headers)
        answer = upstream.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name not in ("Transfer-Encoding", "Connection"):
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            while part := answer.read1():
                self.wfile.write(part)
        upstream.close()

    do_POST = do_GET

    def log_message(self, *words):
        """Quiet."""


@pytest.fixture
def stripping_proxy(monkeypatch):
    """The URL of a StrippingProxy."""
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StrippingProxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}/apps/torc"
    proxy.shutdown()
    proxy.server_close()


@pytest.mark.browser
@pytest.mark.parametrize("way", ["stripped", "kept", "forwarded"])
def test_the_dashboard_works_in_a_browser_behind_a_proxy(chromium, server, tmp_path, request, monkeypatch, way):
    if way == "forwarded":
        url, env = request.getfixturevalue("stripping_proxy"), {}
    else:
        url, env = request.getfixturevalue("jupyter")
    dash = Dash(tmp_path, "--port", 0, "--url", server.url, env=env)
    port = re.search(r"TORC_DASH_PORT=(\d+)", dash.log.read_text())[1]
    monkeypatch.setattr(StrippingProxy, "port", int(port))
    if way == "stripped":
        link = url.partition("/user/")[0] + dash.link()
    else:
        link = url + f"proxy/absolute/{port}" * (way == "kept") + "/" + dash.link().rpartition("/")[2]
    visit = Visit(chromium, dash, link=link)
    page, path = visit.page, link.partition("/?")[0].partition("//")[2].partition("/")[2]
    assert [one["path"] for one in visit.context.cookies() if one["name"] == f"torc_dash_{port}"] == [f"/{path}"]
    visit.click("New workflow")
    page.get_by_label("Specification", exact=True).fill(BROWSER_SPEC)
    visit.see("Valid: 4 jobs")
    visit.click("Create", see="not initialized")
    visit.click("Initialize", see="1 job ready")
    page.wait_for_function("() => stream.stop && store.link.state === 'live'")
    visit.click("Run here…", see="ended with failures")                 # its log, as it is written
    page.wait_for_function("() => store.events.some(one => one.type === 'job_failed')")   # streamed
    page.get_by_role("button", name="Close").last.click()
    visit.see("4 of 4 jobs done")
    page.screenshot(path=str(tmp_path / f"{way}.png"))
    with page.expect_download() as download:
        visit.menu("Export")
    assert json.loads(Path(download.value.path()).read_text())["workflow"]["name"] == "seen"
    for place in DASH_PLACES:
        visit.go(place)
    visit.see("no such mesh")             # the output of job 3
    page.reload()
    visit.see("no such mesh")
    assert page.url.startswith(f"{link.partition('/?')[0]}/#/w/1/jobs/3")
    assert visit.trouble == []
    visit.context.close()
    assert dash.stop() == 0


@pytest.mark.browser
def test_pages_ask_now_and_then_where_a_proxy_holds_streams_back(chromium, dash, server):
    client, held = server.client(), []
    workflow_id, ids = make(client, {"a": []})
    visit = Visit(chromium, dash)
    visit.page.route("**/events/stream*", lambda route: held.append(route))
    visit.go(f"/w/{workflow_id}", see="0 of 1 job done")
    node = make_node(client, workflow_id)
    client.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=1)
    client.put(f"/jobs/{ids['a']}/start_job/1/{node}")
    complete(client, ids["a"], workflow_id, node)
    visit.page.wait_for_function("() => store.link.state === 'every'", timeout=30_000)
    visit.see("1 of 1 job done")
    assert held and visit.trouble == []


# ==================================================================================================
# A real cluster: a login host and two compute nodes, each with a network of its own
# ==================================================================================================

CLUSTER = Path(os.environ.get("SLURM_CLUSTER", ROOT.parent / "shared" / "slurm"))
LOGIN = "kl1.hsn.test"                    # the login host's name that compute nodes know


def as_root(*words, check=True):
    """A command of root on the login host."""
    return subprocess.run([CLUSTER / "on", "kl1", *words], check=check, capture_output=True, text=True)


class Cluster:
    """Commands of an ordinary user on the hosts of the cluster, and what they need there."""

    def __init__(self, directory):
        self.directory = directory
        self.python = directory / "venv" / "bin" / "python"
        self.started = []

    def words(self, host, user, words):
        return [str(CLUSTER / "on"), host, "-u", user, "env", f"HOME={self.directory / user}",
                *map(str, words)]

    def run(self, *words, host="kl1", user="hpcuser", timeout=60):
        """Run a command to its end."""
        return subprocess.run(self.words(host, user, words), cwd=self.directory / user, text=True,
                              capture_output=True, timeout=timeout)

    def torc(self, *words, host="kl1", user="hpcuser", env=(), timeout=60):
        """Run torc, by its cached bytecode; on a compute node with that node's plain Python, outside
        of any job."""
        python = self.python if host == "kl1" else "/usr/bin/python3"
        return self.run(*env, python, self.directory / "cached.py", *words, host=host, user=user,
                        timeout=timeout)

    def server(self, *options, user="hpcuser"):
        """Start a server on the login host; (port, what it says on stderr until then)."""
        log = self.directory / user / f"server{len(self.started)}.log"
        with open(log, "w") as errors:
            process = subprocess.Popen(
                self.words("kl1", user, [self.python, self.directory / "torc.py", "server", "run",
                                         *options]),
                cwd=self.directory / user, text=True, stdout=subprocess.PIPE, stderr=errors)
        self.started.append(process)
        line = process.stdout.readline()
        assert line.startswith("TORC_SERVER_PORT="), log.read_text()
        until(lambda: " serves " in log.read_text())
        return int(line.split("=")[1]), log.read_text()

    def empty(self):
        """End all allocations, so that none begins or waits on nodes that other tests need: what a
        node that was down has put back into the queue begins anew two minutes later, and its worker
        looks for its server for ten more."""
        def left():
            return as_root("squeue", "-h", "-o", "%A").stdout.split()

        if left():
            as_root("scancel", "--full", "--signal=KILL", *left(), check=False)
            until(lambda: not left() or as_root("scancel", *left(), check=False) is None, 60)

    def stop(self):
        """End the servers."""
        for process in self.started:
            process.terminate()
            process.communicate(timeout=30)
        self.started.clear()


@pytest.fixture(scope="session")
def cluster_directory():
    """A directory that all users of the cluster can read, with torc.py and a venv for it."""
    if not (CLUSTER / "on").exists() or os.geteuid() != 0:
        pytest.skip("there is no cluster here")
    import tempfile
    directory = Path(tempfile.mkdtemp(prefix="torc-cluster-"))
    directory.chmod(0o755)
    shutil.copy(TORC, directory / "torc.py")
    (directory / "torc.py").chmod(0o644)
    (directory / "cached.py").write_text("import sys\nimport torc\nsys.exit(torc.main())\n")
    subprocess.run(["/usr/bin/python3", "-m", "py_compile", directory / "torc.py"], check=True)
    subprocess.run(["/usr/bin/python3", "-m", "venv", directory / "venv"], check=True)
    subprocess.run([directory / "venv" / "bin" / "pip", "install", "-q", "bottle", "waitress", "PyYAML"],
                   check=True)
    for user in ("hpcuser", "other"):
        (directory / user).mkdir(mode=0o700)
        shutil.chown(directory / user, user, user)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def cluster(cluster_directory):
    """The cluster, with servers and allocations that end with the test."""
    cluster = Cluster(cluster_directory)
    yield cluster
    cluster.stop()
    cluster.empty()


@pytest.mark.slurm
def test_a_local_server_is_for_its_own_machine_and_says_so_elsewhere(cluster):
    port, said = cluster.server("--database", "a.db", "--port", "8080")
    assert f"at http://127.0.0.1:{port}/" in said and "WARNING" not in said
    done = cluster.torc("workflows", "list")         # nothing set
    assert done.returncode == 0 and "using your server http://localhost:8080" in done.stderr
    done = cluster.torc("ping", "--url", f"http://{LOGIN}:{port}", host="c1")
    assert done.returncode == 1 and (
        "connection refused: no program listens there. The server has stopped, or listens on another "
        "address (one on 127.0.0.1 can be reached only from its own machine)") in done.stderr


@pytest.mark.slurm
def test_an_open_server_names_addresses_that_compute_nodes_reach(cluster):
    port, said = cluster.server("--database", "b.db", "--host", "0.0.0.0", "--port", "0")
    urls = re.findall(r"http://[^,\s]+", said.split(" serves ")[1])
    assert "--auth-file FILE --require-auth" in said
    assert [url for url in urls if "127.0.0.1" not in url and "localhost" not in url]
    for url in urls:
        done = cluster.torc("ping", "--url", url)
        assert done.returncode == 0, done.stderr
        if "127.0.0.1" not in url:
            for host in ("c1", "c2"):
                done = cluster.torc("ping", "--url", url, host=host)
                assert done.returncode == 0, done.stderr
    assert cluster.run("curl", "-s", f"http://{LOGIN}:{port}{torc.API_PREFIX}/ping",
                       host="c1").stdout == '{"status":"ok"}'


@pytest.mark.slurm
def test_a_server_on_a_routable_name_is_found_by_all(cluster):
    cluster.server("--database", "c.db", "--host", LOGIN, "--port", "8080")
    done = cluster.torc("workflows", "list")         # localhost leads nowhere, but it is ours
    assert done.returncode == 0 and "using your server http://10.77.0.1:8080" in done.stderr
    done = cluster.torc("ping", "--url", "http://kl1:8080", host="c2")
    assert done.returncode == 1 and "kl1:8080: this machine cannot resolve the name" in done.stderr
    assert cluster.torc("ping", "--url", f"http://{LOGIN}:8080", host="c2").returncode == 0


@pytest.mark.slurm
def test_a_firewall_is_named_as_such(cluster):
    port, _ = cluster.server("--database", "d.db", "--host", "0.0.0.0", "--port", "0")
    url = f"http://{LOGIN}:{port}"
    try:
        subprocess.run([CLUSTER / "firewall", "on", str(port)], check=True, capture_output=True)
        done = cluster.torc("ping", "--url", url, host="c1")
        assert done.returncode == 1 and "a firewall drops packets to that port" in done.stderr
        assert cluster.torc("ping", "--url", url).returncode == 0
    finally:
        subprocess.run([CLUSTER / "firewall", "off"], check=True, capture_output=True)
    assert cluster.torc("ping", "--url", url, host="c1").returncode == 0


@pytest.mark.slurm
def test_the_doctor_sees_from_a_compute_node_what_workers_would_see(cluster):
    port, _ = cluster.server("--database", "g.db", "--host", "0.0.0.0", "--port", "0")
    shared = cluster.directory / "hpcuser" / "out"
    done = cluster.torc("doctor", "--url", f"http://{LOGIN}:{port}", "--from-compute", "-o", shared,
                        "-f", "json", timeout=120)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"], done.stdout
    seen = {(check["place"], check["check"].split()[0]) for check in report["checks"]}
    assert {("kl1", "version"), ("c1", "version"), ("c1", "credentials"), ("c1", "output")} <= seen
    assert not list(shared.iterdir())
    done = cluster.torc("doctor", "--url", f"http://kl1:{port}", "--from-compute", "-o", shared,
                        timeout=120)
    assert done.returncode == 1
    assert re.search(r"c1 +name kl1 +fail +unknown here +this machine cannot resolve the name",
                     done.stdout), done.stdout


@pytest.mark.slurm
def test_proxy_variables_are_not_used(cluster):
    port, _ = cluster.server("--database", "e.db", "--host", LOGIN, "--port", "0")
    proxies = [f"{name}=http://192.0.2.1:9" for name in ("http_proxy", "HTTP_PROXY", "https_proxy",
                                                         "ALL_PROXY")]
    done = cluster.torc("ping", "--url", f"http://{LOGIN}:{port}", host="c1", env=["env", *proxies])
    assert done.returncode == 0, done.stderr


@pytest.mark.slurm
def test_another_user_gets_nothing_without_the_password(cluster):
    done = cluster.run("bash", "-c", f"echo 'a long sentence' | {cluster.python} {cluster.directory}/"
                       "torc.py htpasswd add -f users --password-stdin hpcuser")
    assert done.returncode == 0, done.stderr
    port, said = cluster.server("--database", "f.db", "--host", "0.0.0.0", "--port", "0",
                                "--auth-file", "users", "--require-auth")
    url = f"http://{LOGIN}:{port}"
    mine = ["env", "TORC_USERNAME=hpcuser", "TORC_PASSWORD=a long sentence"]
    assert cluster.torc("workflows", "list", "--url", url, env=mine, host="c1").returncode == 0
    for env, said in (((), "requires a user name and password"), (
            ["env", "TORC_USERNAME=hpcuser", "TORC_PASSWORD=a wrong sentence"],
            "refuses this password of the user hpcuser")):
        done = cluster.torc("workflows", "list", "--url", url, user="other", env=env)
        assert done.returncode == 1 and said in done.stderr
    for name in ("users", "f.db"):
        assert (cluster.directory / "hpcuser" / name).stat().st_mode & 0o077 == 0
    seen = cluster.run("bash", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr "
                       "'\\0' ' '", user="other").stdout
    assert "torc.py server run" in seen and "long sentence" not in seen


# ---- allocations

SMALL = {"name": "small", "num_cpus": 1, "memory": "100m", "runtime": "PT1M"}
MINE = ("TORC_USERNAME=hpcuser", f"TORC_PASSWORD={PASSWORD}")


def allocation_spec(cluster, name, jobs, needs=(), actions=None, user="hpcuser", number=1,
                    scheduler=(), **top):
    """A specification whose jobs run in allocations; returns its path."""
    path = cluster.directory / user / f"{name}.json"
    path.write_text(json.dumps({
        "name": name, "resource_requirements": [SMALL, *needs],
        "slurm_schedulers": [{"name": "s", "account": "torc", "nodes": 1, "ntasks_per_node": 2,
                              "walltime": "00:10:00", **dict(scheduler)}],
        "jobs": [{"name": key, **({"resource_requirements": "small"} if needs != [] else {}),
                  **({"command": job} if isinstance(job, str) else job)}
                 for key, job in jobs.items()],
        "actions": actions or [{"trigger_type": "on_workflow_start", "scheduler": "s",
                                "action_type": "schedule_nodes", "scheduler_type": "slurm",
                                "num_allocations": number}], **top}))
    shutil.chown(path, user, user)
    return path


class Site:
    """A server that compute nodes reach, and a user's commands on it from the login host, where
    TORC_API_URL says localhost."""

    def __init__(self, cluster, name, *options, env=(), user="hpcuser"):
        self.cluster, self.name, self.user = cluster, name, user
        self.output = cluster.directory / user / f"out_{name}"
        port, self.said = cluster.server("--database", f"{name}.db", "--host", "0.0.0.0",
                                         "--port", "0", *options, user=user)
        self.port = port
        self.env = [f"TORC_API_URL=http://localhost:{port}", *env]

    def torc(self, *words, ok=True, timeout=90, env=()):
        """Run a command; its completed process."""
        done = self.cluster.torc(*words, env=["env", *self.env, *env], user=self.user,
                                 timeout=timeout)
        if ok:
            assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done

    def json(self, *words, **more):
        """The JSON that a command prints."""
        return json.loads(self.torc("-f", "json", *words, **more).stdout)

    def submit(self, spec, *words, **more):
        """Submit a specification; the ids of the Slurm jobs."""
        return self.json("submit", spec, "-o", self.output, *words, **more)["slurm_jobs"]

    def statuses(self, workflow_id=1):
        """{job: status}."""
        return {job["name"]: job["status"] for job in self.json("jobs", "list",
                                                                workflow_id)["jobs"]}

    def until(self, wanted, workflow_id=1, seconds=60):
        """Wait until the jobs have these statuses."""
        until(lambda: self.statuses(workflow_id) == wanted, seconds, str(wanted))

    def logs(self):
        """What the workers said, for messages of assertions."""
        return "\n".join(path.read_text() for path in sorted(self.output.glob("*.e")))


@pytest.mark.slurm
def test_two_nodes_share_forty_jobs_though_the_submitter_says_localhost(cluster):
    site = Site(cluster, "two")
    jobs = {f"j{number}": "hostname; sleep 0.3" for number in range(40)}
    site.submit(allocation_spec(cluster, "two", jobs, scheduler={"nodes": 2, "ntasks_per_node": 4}))
    done = site.torc("wait", "1")
    assert "40 completed" in done.stdout, site.logs()
    hosts = [path.read_text().strip() for path in (site.output / "job_stdio").glob("*.o")]
    assert set(hosts) == {"c1", "c2"} and len(hosts) == 40
    nodes = site.json("compute-nodes", "list", 1)["compute_nodes"]
    assert sorted(node["hostname"] for node in nodes) == ["c1", "c2"]
    assert {node["compute_node_type"] for node in nodes} == {"slurm"}
    until(lambda: [record["status"] for record in site.json(
        "scheduled-compute-nodes", "list", 1)["scheduled_compute_nodes"]] == ["complete"])
    assert not list(site.output.glob("*.sh")) and not list(site.output.glob("*.note"))
    assert "COMPLETED" in site.torc("slurm", "sacct", 1).stdout


@pytest.mark.slurm
def test_a_server_on_loopback_is_refused_before_anything_is_submitted(cluster):
    port, _ = cluster.server("--database", "loop.db", "--port", "0")
    spec = allocation_spec(cluster, "loop", {"a": "true"})
    env = ["env", f"TORC_API_URL=http://localhost:{port}"]
    done = cluster.torc("submit", spec, env=env)
    assert done.returncode == 1 and "torc-server run --host 0.0.0.0 --port" in done.stderr
    assert json.loads(cluster.torc("-f", "json", "workflows", "list", env=env).stdout) == {
        "workflows": []}
    done = cluster.torc("submit", spec, "--database", "local.db")
    assert done.returncode == 2 and "compute nodes cannot work on the database file" in done.stderr
    done = cluster.torc("submit", spec, "--worker-url", f"http://{LOGIN}:{port}", "--dry-run", env=env)
    assert f"slurm-job-runner http://{LOGIN}:{port}/torc-service/v1 " in done.stdout


@pytest.mark.slurm
def test_a_canceled_allocation_gives_its_jobs_back(cluster):
    site = Site(cluster, "scancel")
    [number] = site.submit(allocation_spec(cluster, "scancel", {
        "a": 'test "$TORC_ATTEMPT_ID" = 2 || sleep 100', "b": "true"}))
    site.until({"a": "running", "b": "completed"})
    cluster.run("scancel", number)
    site.until({"a": "ready", "b": "completed"})
    assert site.torc("status", 1).stderr.endswith("to request another allocation:\n  torc slurm schedule-nodes 1\n")
    [first] = [result for result in site.json("results", "list", 1, "--all-runs")["results"]
               if result["job_id"] == 1]
    assert (first["status"], first["return_code"]) == ("terminated", 143)
    site.torc("slurm", "schedule-nodes", 1, "-o", site.output)
    site.torc("wait", 1)
    assert site.statuses() == {"a": "completed", "b": "completed"}


@pytest.mark.slurm
def test_at_the_time_limit_jobs_are_terminated_and_the_rest_stays_ready(cluster):
    site = Site(cluster, "limit")
    site.submit(allocation_spec(
        cluster, "limit", {"a": "trap 'echo saved; exit 0' TERM; sleep 300 & wait",
                           "b": "sleep 300", "c": "sleep 300"}, scheduler={"walltime": "00:01:00"}))
    site.until({"a": "completed", "b": "terminated", "c": "ready"}, seconds=90)
    assert site.torc("logs", 1, "--stdout").stdout == "saved\n"
    assert [result["return_code"] for result in site.json("results", "list", 1)["results"]
            if result["job_id"] == 2] == [152]
    assert "152 (time limit)" in site.torc("why", 2).stdout


@pytest.mark.slurm
def test_steps_of_srun_are_told_apart_by_slurms_accounting(cluster):
    site = Site(cluster, "steps")
    big = "python3 -c 'x = bytearray(10**9); import time; time.sleep(9)'"
    wide = {"name": "wide", "num_cpus": 1, "memory": "100m", "num_nodes": 2, "runtime": "PT1M"}
    site.submit(allocation_spec(cluster, "steps", {
        "a": "echo step $SLURM_STEP_ID on $(hostname); sleep 2", "b": "sleep 2", "c": "sleep 2",
        "bad": "exit 3", "big": big,
        "wide": {"command": "srun --overlap --mem=50 hostname", "resource_requirements": "wide"}},
        [wide], execution_config={"mode": "slurm"}, scheduler={"nodes": 2, "ntasks_per_node": 1}))
    site.torc("wait", 1, ok=False, timeout=120)
    results = {result["job_id"]: (result["status"], result["return_code"])
               for result in site.json("results", "list", 1)["results"]}
    assert results == {1: ("completed", 0), 2: ("completed", 0), 3: ("completed", 0),
                       4: ("failed", 3), 5: ("failed", 137), 6: ("completed", 0)}, site.logs()
    assert "OUT_OF_MEMORY" in site.torc("why", 5).stdout
    assert sorted(site.torc("logs", 6, "--stdout").stdout.split()) == ["c1", "c2"]
    stats = until(lambda: (lambda rows: len(rows) == 5 and rows)(
        site.json("slurm", "stats", 1)["slurm_stats"]), 40)
    assert next(row for row in stats if row["job_id"] == 1)["max_rss_bytes"] > 0
    results = {row["job_id"]: row for row in site.json("results", "list", 1)["results"]}
    assert all(results[number]["peak_memory_bytes"] > 0 for number in (1, 2, 3)), results


@pytest.mark.slurm
def test_a_job_that_needs_more_memory_is_recovered_without_a_hand(cluster):
    site = Site(cluster, "recover")
    hungry = "python3 -c 'x = bytearray(140 * 2**20); import time; time.sleep(3)'"
    site.submit(allocation_spec(cluster, "recover", {
        "big": hungry, "small": "true", "after": {"command": "true", "depends_on": ["big"]}}))
    done = site.torc("watch", 1, "--recover", "-o", site.output, timeout=150)
    assert "big: used" in done.stderr and ", then memory" in done.stderr
    assert site.statuses() == {"big": "completed", "small": "completed", "after": "completed"}
    needs = {record["name"]: record["memory"] for record in
             site.json("resource-requirements", "list", 1)["resource_requirements"]}
    assert needs["small"] == "100m"       # of jobs that did not fail
    assert [name for name in needs if name.startswith("small_recovered")]


@pytest.mark.slurm
def test_a_worker_that_was_killed_is_found_out_and_its_jobs_run_again(cluster):
    site = Site(cluster, "killed")
    [number] = site.submit(allocation_spec(cluster, "killed", {
        "a": 'test "$TORC_ATTEMPT_ID" = 2 || sleep 100', "b": "true"}))
    site.until({"a": "running", "b": "completed"})
    [node] = site.json("compute-nodes", "list", 1)["compute_nodes"]
    os.kill(node["pid"], signal.SIGKILL)
    until(lambda: f"Slurm job {number} has ended" in site.torc("status", 1).stdout)
    assert "ready again" not in site.torc("workflows", "sync-status", 1, "--dry-run").stdout
    assert site.statuses()["a"] == "running"
    done = site.torc("watch", 1, "--auto-schedule", "-o", site.output, timeout=150)
    assert "1 job ready again" in done.stderr and "allocation submitted" in done.stderr
    assert site.statuses() == {"a": "completed", "b": "completed"}
    assert [result["return_code"] for result in site.json("results", "list", 1, "--all-runs")[
        "results"] if result["job_id"] == 1] == [-128, 0]


def processes_of_allocation(number):
    """pids of all that Slurm has started for an allocation."""
    return [int(pid) for pid in filter(str.isdigit, os.listdir("/proc"))
            if f"SLURM_JOB_ID={number}".encode() in torc.read_bytes(f"/proc/{pid}/environ").split(b"\0")]


MOST = {"name": "most", "num_cpus": 3, "num_gpus": 0, "num_nodes": 1, "memory": "200m", "runtime": "PT5M"}


@pytest.mark.slurm
def test_a_worker_that_has_nothing_to_do_settles_what_a_dead_one_left(cluster):
    """Nobody watches: worker, guardian and job of one of two allocations are killed at once."""
    site = Site(cluster, "idle")
    job = {"command": 'test "$TORC_ATTEMPT_ID" = 2 || sleep 15', "resource_requirements": "most"}
    numbers = site.submit(allocation_spec(cluster, "idle", {"a": job, "b": job}, needs=[MOST], number=2,
                                          scheduler={"ntasks_per_node": 4}))
    site.until({"a": "running", "b": "running"})
    assert len(site.json("compute-nodes", "list", 1)["compute_nodes"]) == 2
    for pid in processes_of_allocation(numbers[0]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    site.until({"a": "completed", "b": "completed"}, seconds=120)
    died = [node["death"] for node in site.json("compute-nodes", "list", 1)["compute_nodes"] if node.get("death")]
    assert [death["kind"] for death in died] == ["allocation"], site.logs()
    assert sorted(job["attempt_id"] for job in site.json("jobs", "list", 1)["jobs"]) == [1, 2]


ENDINGS = {"traps": "trap 'exit 3' TERM; sleep 300 & wait $!", "sleeps": "exec sleep 300",
           "python": "exec python3 -c 'import signal,sys,time;signal.signal(15,lambda *_:sys.exit(1));time.sleep(300)'",
           "shell": "sleep 300 || exit 7"}


@pytest.mark.slurm
def test_jobs_that_fail_as_their_allocation_is_canceled_have_not_failed(cluster):
    site = Site(cluster, "struck")
    jobs = {f"{name}{number}": command for name, command in ENDINGS.items() for number in (1, 2)}
    numbers = site.submit(allocation_spec(cluster, "struck", jobs, number=2, scheduler={"ntasks_per_node": 4}))
    site.until(dict.fromkeys(jobs, "running"))
    cluster.run("scancel", *numbers)
    site.until(dict.fromkeys(jobs, "ready"), seconds=30)


@pytest.fixture
def badly(cluster):
    """badly(name=script, ...): an environment in which Slurm's programs are these first; $real is the real one."""
    folder = cluster.directory / "hpcuser" / "badly"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def make(**scripts):
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/bash\nreal={shutil.which(name)}\n{script}\n")
            (folder / name).chmod(0o755)
        return [f"PATH={folder}:/usr/local/bin:/usr/bin:/bin"]
    return make


@pytest.mark.slurm
def test_where_slurm_forgets_nothing_is_asked_for_twice(cluster, badly):
    site = Site(cluster, "forgets")
    site.submit(allocation_spec(cluster, "forgets", {"a": "sleep 20", "b": {"command": "true", "depends_on": ["a"]}}))
    site.until({"a": "running", "b": "blocked"})
    env = badly(squeue="case \"$*\" in *-j*) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1;; esac",
                sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1",
                sbatch="echo x >> submitted; exec $real \"$@\"",
                scontrol="case \"$*\" in *config*) exec $real \"$@\";; esac; exit 1")
    done = site.torc("watch", 1, "--auto-schedule", "--poll-interval", 1, "-o", site.output, env=env, timeout=120)
    assert site.statuses() == {"a": "completed", "b": "completed"}, done.stderr
    assert not (cluster.directory / "hpcuser" / "submitted").exists(), done.stderr
    assert {job["attempt_id"] for job in site.json("jobs", "list", 1)["jobs"]} == {1}


@pytest.mark.slurm
def test_an_allocation_that_sbatch_says_nothing_of_is_found_and_used(cluster, badly):
    site = Site(cluster, "timeout")
    env = badly(sbatch="$real \"$@\" > /dev/null; echo 'sbatch: error: Batch job submission failed: "
                       "Socket timed out on send/recv operation' >&2; exit 1")
    [number] = site.submit(allocation_spec(cluster, "timeout", {"a": "true"}), env=env)
    assert "1 completed" in site.torc("wait", 1).stdout, site.logs()
    records = site.json("scheduled-compute-nodes", "list", 1)["scheduled_compute_nodes"]
    assert [record["scheduler_id"] for record in records] == [number]


def staged_spec(cluster, name, stages, **top):
    """A specification of stages {name: (number of jobs, command)}, each after the one before; without allocations."""
    jobs, before = [], []
    for stage, (number, command) in stages.items():
        made = [{"name": f"{stage}_{one}", "command": command, "depends_on": before, "resource_requirements": "small"}
                for one in range(number)]
        before = [job["name"] for job in made]
        jobs += made
    path = cluster.directory / "hpcuser" / f"{name}.json"
    path.write_text(json.dumps({"name": name, "resource_requirements": [SMALL], "jobs": jobs, **top}))
    shutil.chown(path, "hpcuser", "hpcuser")
    return path


@pytest.mark.slurm
def test_submit_is_enough_for_a_pipeline_without_a_word_about_allocations(cluster):
    site = Site(cluster, "enough")
    spec = staged_spec(cluster, "enough", {"a": (12, "sleep 2"), "b": (12, "sleep 2"), "c": (1, "true")})
    done = site.torc("submit", spec, "-o", site.output, "--partition", "debug")
    assert "allocations submitted: Slurm job" in done.stdout
    done = site.torc("wait", 1, timeout=120)
    assert "25 completed" in done.stdout, site.logs()
    records = site.json("scheduled-compute-nodes", "list", 1)["scheduled_compute_nodes"]
    assert 1 <= len(records) <= 4, site.logs()
    until(lambda: not cluster.run("squeue", "-h", "-u", "hpcuser").stdout, 60)


def allocations_of(site):
    """{Slurm job: status} of a workflow's allocations."""
    return {record["scheduler_id"]: record["status"] for record in site.json(
        "scheduled-compute-nodes", "list", 1)["scheduled_compute_nodes"]}


@pytest.mark.slurm
def test_automatic_allocations_come_and_go_with_the_stages(cluster):
    """From none to two, to none while nothing is ready, and again; no worker is idle for longer than it may be."""
    site = Site(cluster, "stages")
    spec = staged_spec(cluster, "stages", {"a": (8, "sleep 3"), "gate": (1, "test -e go"), "b": (8, "sleep 3")},
                       use_pending_failed=True)
    site.torc("submit", spec, "-o", site.output, "--partition", "debug", "--max-allocations", 2)
    site.torc("slurm", "auto", 1, "--idle", "3s")
    until(lambda: site.statuses()["gate_0"] == "pending_failed", 60)
    until(lambda: set(allocations_of(site).values()) == {"complete"} and not cluster.run("squeue", "-h").stdout, 60)
    first = allocations_of(site)
    assert 1 <= len(first) <= 2, site.logs()
    assert "submitted" not in site.torc("status", 1).stderr          # nothing is ready
    (cluster.directory / "hpcuser" / "go").touch()
    site.torc("jobs", "resolve", 1 + 8, "retry")
    watch = site.torc("watch", 1, "-o", site.output, timeout=120)
    assert "allocation submitted" in watch.stderr and set(site.statuses().values()) == {"completed"}, site.logs()
    until(lambda: not cluster.run("squeue", "-h").stdout, 60)
    assert len(allocations_of(site)) - len(first) <= 2, site.logs()
    assert set(allocations_of(site).values()) <= {"complete", "canceled"}
    ends = {}
    for row in site.json("results", "list", 1, "--all-runs")["results"]:
        ends[row["compute_node_id"]] = max(ends.get(row["compute_node_id"], 0), torc.parse_time(row["completion_time"]) / 1000)
    for node in site.json("compute-nodes", "list", 1)["compute_nodes"]:
        begun = torc.parse_time(node["start_time"]) / 1000
        assert begun + node["duration_seconds"] - ends.get(node["id"], begun) <= 3 + 6


@pytest.mark.slurm
def test_automatic_allocations_survive_a_paused_queue_and_scancel(cluster):
    site = Site(cluster, "survives")
    spec = staged_spec(cluster, "survives", {"a": (2, 'test "$TORC_ATTEMPT_ID" = 2 || sleep 100')})
    try:
        as_root("scontrol", "update", "nodename=c1,c2", "state=drain", "reason=test")
        [number] = site.json("submit", spec, "-o", site.output, "--partition", "debug")["slurm_jobs"]
        site.torc("slurm", "auto", 1, "--max", 9)
        assert list(allocations_of(site)) == [number]        # it waits, and no other is requested
    finally:
        as_root("scontrol", "update", "nodename=c1,c2", "state=resume")
    site.until({"a_0": "running", "a_1": "running"})
    cluster.run("scancel", number)
    site.until({"a_0": "ready", "a_1": "ready"}, seconds=30)
    done = site.torc("watch", 1, "-o", site.output, timeout=150)
    assert site.statuses() == {"a_0": "completed", "a_1": "completed"}, done.stderr + site.logs()
    assert len(allocations_of(site)) == 2


def in_allocation(cluster, name, jobs, *options, needs=(SMALL,), timeout=150):
    """Run jobs {name: command} by `torc run` in an allocation of the user's own; its output, and the database."""
    path = cluster.directory / "hpcuser" / f"{name}.json"
    path.write_text(json.dumps({"name": name, "resource_requirements": needs, "jobs": [
        {"name": key, "command": command, "resource_requirements": needs[0]["name"]} for key, command in jobs.items()]}))
    shutil.chown(path, "hpcuser", "hpcuser")
    script = f"{cluster.python} {cluster.directory}/torc.py run {path} -o {path.parent}/out_{name}"
    done = cluster.run("bash", "-c", f"sbatch --wait -o {path.parent}/{name}.log {shlex.join(options)} --wrap "
                       f"{shlex.quote(script)}; cat {path.parent}/{name}.log", timeout=timeout)
    return done.stdout + done.stderr, f"{path.parent}/out_{name}/torc.db"


def records_in(cluster, database, *words):
    """The records that a command lists."""
    [records] = json.loads(cluster.torc("-f", "json", "--database", database, *words).stdout).values()
    return records


@pytest.mark.slurm
def test_run_in_an_allocation_keeps_to_its_cpus_memory_and_end(cluster):
    said, database = in_allocation(cluster, "inside", {**{f"j{number}": "sleep 1" for number in range(4)}},
                                   "--cpus-per-task=2", "--mem=800M", "--time=2")
    assert "with 2 CPUs, 800.0 MB, 0 GPUs" in said and "4 completed" in said, said
    [node] = records_in(cluster, database, "compute-nodes", "list", "1")
    assert (node["compute_node_type"], node["num_cpus"]) == ("slurm", 2)
    long = {"name": "long", "num_cpus": 1, "memory": "100m", "runtime": "PT10M"}
    said, database = in_allocation(cluster, "outlasts", {"a": "sleep 500"}, "--cpus-per-task=2", "--time=2", needs=[long])
    assert "needs PT10M (there are" in said and "with 2 CPUs, 2.0 GB" in said, said       # 1000 MB a CPU by default
    assert not records_in(cluster, database, "results", "list", "1")


@pytest.mark.slurm
def test_run_in_an_allocation_of_two_nodes_uses_both(cluster):
    said, database = in_allocation(cluster, "both", {f"j{number}": "hostname; sleep 2" for number in range(8)},
                                   "--nodes=2", "--ntasks-per-node=4", "--time=5")
    assert "8 completed" in said, said
    hosts = [path.read_text().strip() for path in Path(database).parent.glob("job_stdio/*.o")]
    assert sorted(hosts) == ["c1"] * 4 + ["c2"] * 4


@pytest.mark.slurm
def test_run_under_salloc_on_the_login_host_runs_jobs_in_the_allocation(cluster):
    path = cluster.directory / "hpcuser" / "salloc.json"
    path.write_text(json.dumps({"name": "salloc", "jobs": [{"name": "a", "command": "hostname"}]}))
    done = cluster.run("salloc", "--time=5", cluster.python, cluster.directory / "torc.py", "run", path, "-o",
                       path.parent / "out_salloc", timeout=120)
    assert "1 completed" in done.stderr, done.stderr
    assert next((path.parent / "out_salloc" / "job_stdio").glob("*.o")).read_text().strip() in ("c1", "c2")


@pytest.mark.slurm
def test_allocations_of_a_chain_run_one_after_the_other(cluster):
    site = Site(cluster, "chain")
    numbers = site.submit(allocation_spec(cluster, "chain", {f"j{number}": "sleep 12" for number in range(4)},
                                          number=2, scheduler={"serialize_allocations": True}))
    names = cluster.run("squeue", "-h", "-o", "%j|%E|%T", "-j", ",".join(map(str, numbers))).stdout.split()
    assert {name.split("|")[0] for name in names} == {"torc-wf1-s1"} and "singleton" in str(names)
    site.until({f"j{number}": "completed" for number in range(4)}, seconds=90)
    nodes = site.json("compute-nodes", "list", 1)["compute_nodes"]
    starts = sorted((torc.parse_time(node["start_time"]), node["scheduler"]["scheduler_id"]) for node in nodes)
    assert len(starts) == 1 or starts[1][0] - starts[0][0] >= 12_000
    done = site.torc("slurm", "schedule-nodes", 1, "--job-prefix", "x", ok=False)
    assert done.returncode == 2 and "--job-prefix is not for them" in done.stderr


@pytest.mark.slurm
def test_workers_that_suppress_actions_carry_out_none(cluster):
    site = Site(cluster, "suppress")
    spec = allocation_spec(cluster, "suppress", {"a": "true"}, actions=[
        {"trigger_type": "on_workflow_start", "action_type": "run_commands", "commands": ["touch began"]}])
    site.torc("create", spec)
    site.torc("slurm", "schedule-nodes", 1, "-o", site.output, "--suppress-actions")
    site.torc("wait", 1)
    assert site.statuses() == {"a": "completed"} and not (site.output / "began").exists(), site.logs()
    assert len(site.json("scheduled-compute-nodes", "list", 1)["scheduled_compute_nodes"]) == 1


@pytest.mark.slurm
def test_the_last_worker_cancels_what_is_still_queued(cluster):
    site = Site(cluster, "queued")
    numbers = site.submit(allocation_spec(cluster, "queued", {"a": "sleep 4"}, number=6,
                                          scheduler={"ntasks_per_node": 4}))
    site.until({"a": "completed"})

    def states():
        return sorted(record["status"] for record in site.json(
            "scheduled-compute-nodes", "list", 1)["scheduled_compute_nodes"])

    until(lambda: set(states()) <= {"canceled", "complete"}, 60)
    assert states().count("canceled") >= 3
    until(lambda: not cluster.run("squeue", "-h", "-j", ",".join(map(str, numbers))).stdout, 60)


@pytest.mark.slurm
def test_a_node_that_goes_down_costs_an_attempt_and_no_job(cluster):
    site = Site(cluster, "down")
    site.submit(allocation_spec(cluster, "down", {
        "a": 'hostname; test "$TORC_ATTEMPT_ID" = 2 || sleep 100', "b": "true"}))
    site.until({"a": "running", "b": "completed"})
    [node] = site.json("compute-nodes", "list", 1)["compute_nodes"]
    host = node["hostname"]
    try:
        as_root("scontrol", "update", f"nodename={host}", "state=down", "reason=test")
        done = site.torc("watch", 1, "--auto-schedule", "-o", site.output, timeout=150)
    finally:
        as_root("scontrol", "update", f"nodename={host}", "state=resume", check=False)    # or it is back
    assert site.statuses() == {"a": "completed", "b": "completed"}, done.stderr
    codes = {result["attempt_id"]: result["return_code"] for result in site.json(
        "results", "list", 1, "--all-runs")["results"] if result["job_id"] == 1}
    assert codes[2] == 0 and codes[1] != 0


@pytest.mark.slurm
@pytest.mark.parametrize("busy, message", [
    ("torc", "is in use (pid {pid}, python"), ("other", "another program answers there")])
def test_a_port_that_is_taken_is_named_with_who_has_it(cluster, busy, message):
    port = free_port()
    other = subprocess.Popen(
        cluster.words("kl1", "hpcuser", [cluster.python, "-m", "http.server", port, "--bind", "0.0.0.0"]),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: cluster.run("curl", "-s", f"http://localhost:{port}/").returncode == 0)
        if busy == "other":
            done = cluster.torc("ping", "--url", f"http://{LOGIN}:{port}", host="c2")
            assert done.returncode == 1 and "is a Torc server there?" in done.stderr
            done = cluster.torc("doctor", "--url", f"http://{LOGIN}:{port}", host="c2")
        else:
            done = cluster.torc("server", "run", "--port", port, "--database", "busy.db")
        assert done.returncode == 1
        said = done.stdout + done.stderr
        assert re.search(re.escape(message).replace(r"\{pid\}", r"\d+"), said), said
        assert busy == "other" or f"--port {port + 1}, or --port 0" in said
    finally:
        other.terminate(), other.wait()


@pytest.mark.slurm
def test_workers_find_a_server_that_comes_back_on_another_port(cluster):
    site = Site(cluster, "moved")
    site.submit(allocation_spec(cluster, "moved", {"a": f"touch here; sleep 6",
                                                   "b": {"command": "true", "depends_on": ["a"]}}))
    site.until({"a": "running", "b": "blocked"})
    cluster.stop()
    moved = Site(cluster, "moved")
    assert moved.port != site.port
    moved.until({"a": "completed", "b": "completed"})
    assert "the server is back" in moved.logs()


@pytest.mark.slurm
def test_later_allocations_are_asked_for_by_runners_and_by_the_owners_next_command(cluster):
    site = Site(cluster, "later")
    actions = [{"trigger_type": "on_workflow_start", "scheduler": "s", "scheduler_type": "slurm",
                "action_type": "schedule_nodes"},
               {"trigger_type": "on_jobs_ready", "scheduler": "s", "scheduler_type": "slurm",
                "action_type": "schedule_nodes", "jobs": ["b"]}]
    wide = {"name": "wide", "num_cpus": 3, "memory": "100m", "runtime": "PT1M"}
    spec = allocation_spec(cluster, "later", {
        "a": "true", "b": {"command": "true", "depends_on": ["a"], "resource_requirements": "wide"}},
        [wide], actions, scheduler={"ntasks_per_node": 4})

    def allocations(workflow_id):
        return len(site.json("scheduled-compute-nodes", "list", workflow_id)[
            "scheduled_compute_nodes"])

    site.submit(spec)
    site.torc("wait", 1)
    assert allocations(1) == 2
    # The same while no runner is there that could ask for them.
    tools = cluster.directory / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "true"):
        with contextlib.suppress(FileExistsError):
            (tools / name).symlink_to(shutil.which(name))
    site.torc("create", spec)
    done = site.torc("run", 2, "-o", site.output, "--num-cpus", 2, ok=False, env=[f"PATH={tools}"])
    assert done.returncode == 3 and "asks for allocations: `torc submit 2`" in done.stderr
    assert site.statuses(2) == {"a": "completed", "b": "ready"} and allocations(2) == 0
    assert "1 allocation submitted" in site.torc("status", 2, "-o", site.output).stderr
    site.torc("wait", 2)
    assert site.statuses(2) == {"a": "completed", "b": "completed"} and allocations(2) == 1


@pytest.mark.slurm
def test_cancel_ends_the_allocations_that_live_and_no_others(cluster):
    site = Site(cluster, "cancel")
    ids = site.submit(allocation_spec(cluster, "cancel", {"a": "sleep 100"}, number=3,
                                      scheduler={"ntasks_per_node": 4}))
    site.until({"a": "running"})
    answer = site.json("cancel", 1)
    assert answer["status"] == "success" and set(answer["canceled_slurm_jobs"]) <= set(ids)
    until(lambda: not cluster.run("squeue", "-h", "-j", ",".join(map(str, ids))).stdout.strip())
    assert site.statuses() == {"a": "canceled"}
    assert site.json("cancel", 1)["canceled_slurm_jobs"] == []


@pytest.mark.slurm
@pytest.mark.parametrize("export", ["ALL", "NONE"])
def test_the_password_reaches_workers_and_nobody_else(cluster, export):
    home = cluster.directory / "hpcuser"
    cluster.run("bash", "-c", f"echo '{PASSWORD}' | {cluster.python} {cluster.directory}/torc.py "
                "htpasswd add -f users --password-stdin hpcuser")
    site = Site(cluster, f"secret{export}", "--auth-file", "users", "--require-auth", env=MINE)
    [number] = site.submit(allocation_spec(cluster, "secret", {"a": "echo treasure; sleep 4"}),
                           "--keep-submission-scripts", env=[f"SBATCH_EXPORT={export}"])
    site.until({"a": "running"})
    seen = cluster.run("bash", "-c", f"scontrol show job {number}; scontrol write batch_script "
                       f"{number} -; cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr "
                       f"'\\0' ' '; cat {site.output}/*.sh {site.output}/.cred* {site.output}/*/*",
                       user="other").stdout
    assert f"JobId={number}" in seen and "slurm-job-runner" in seen
    assert PASSWORD not in seen and "treasure" not in seen.replace("echo treasure", "")
    [script] = site.output.glob("*.sh")
    for path in site.output.rglob("*"):
        if path.is_file() and ".credentials" not in path.name:
            assert PASSWORD not in path.read_text(), path
    assert script.stat().st_mode & 0o077 == 0 and site.output.stat().st_mode & 0o077 == 0
    assert len(list(site.output.glob(".credentials*"))) == (export == "NONE")
    for path in site.output.glob(".credentials*"):
        assert path.stat().st_mode & 0o077 == 0
    assert PASSWORD.encode() not in (home / f"secret{export}.db").read_bytes()
    site.until({"a": "completed"})
    until(lambda: not list(site.output.glob(".credentials*")))


@pytest.mark.slurm
def test_users_of_a_shared_server_are_kept_apart_unless_a_group_joins_them(cluster):
    cluster.run("bash", "-c", "rm -f both; for user in hpcuser other; do echo \"$user's long sentence\" "
                f"| sed s/$user/my/ | {cluster.python} {cluster.directory}/torc.py htpasswd add -f both "
                "--password-stdin $user; done")
    site = Site(cluster, "shared", "--auth-file", "both", "--require-auth", "--enforce-access-control",
                "--admin-user", "hpcuser",
                env=("TORC_USERNAME=hpcuser", "TORC_PASSWORD=my's long sentence"))
    others = ["env", f"TORC_API_URL=http://{LOGIN}:{site.port}", "TORC_USERNAME=other",
              "TORC_PASSWORD=my's long sentence"]
    site.submit(allocation_spec(cluster, "shared", {"a": "true"}))
    site.torc("wait", 1)
    for words in (["workflows", "get", 1], ["jobs", "list", 1], ["cancel", 1], ["delete", 1, "--force"],
                  ["run", 1]):
        done = cluster.torc(*words, user="other", env=others)
        assert done.returncode == 1 and "may not use workflow 1" in done.stderr, (words, done.stderr)
    assert "No workflows" in cluster.torc("workflows", "list", "--all-users", user="other",
                                          env=others).stdout
    site.torc("access-groups", "create", "team")
    site.torc("access-groups", "add-user", 2, "other")
    site.torc("access-groups", "add-workflow", 1, 2)
    assert cluster.torc("jobs", "list", 1, user="other", env=others).returncode == 0
    done = cluster.torc("run", 1, user="other", env=others)
    assert done.returncode == 2 and "--allow-owner hpcuser" in done.stderr
    _, said = cluster.server("--database", "warned.db", "--port", "0", "--auth-file", "both",
                             "--require-auth")
    assert "--enforce-access-control keeps them apart" in said


@pytest.mark.slurm
def test_workers_speak_tls(cluster, certificates):
    for name in ("good.pem", "good.key", "ca.pem"):
        shutil.copy(certificates / name, cluster.directory / "hpcuser" / name)
        shutil.chown(cluster.directory / "hpcuser" / name, "hpcuser", "hpcuser")
    site = Site(cluster, "tls", "--https", "--tls-cert", "good.pem", "--tls-key", "good.key")
    site.env = [f"TORC_API_URL=https://localhost:{site.port}", "TORC_TLS_CA_CERT=ca.pem"]
    site.submit(allocation_spec(cluster, "tls", {"a": "true"}))
    site.torc("wait", 1)
    assert site.statuses() == {"a": "completed"}


@pytest.mark.slurm
def test_a_worker_that_reaches_nobody_says_why_in_status_and_why(cluster):
    site = Site(cluster, "lost")
    for note in (cluster.directory / "hpcuser" / ".torc" / "servers").iterdir():
        note.unlink()                     # a home that compute nodes do not have
    [number] = site.submit(allocation_spec(cluster, "lost", {"a": "true"}), "--worker-url",
                           f"http://kl1:{site.port}", "--worker-url", f"http://{LOGIN}:9")
    for words in (["status", 1], ["why", 1]):
        said = until(lambda: (lambda text: "cannot reach" in text and text)(
            site.torc(*words).stdout), 30)
        assert f"http://kl1:{site.port}/torc-service/v1: this machine cannot resolve the name" in said
        assert f"http://{LOGIN}:9/torc-service/v1: connection refused" in said
    cluster.run("scancel", number)


@pytest.mark.slurm
@pytest.mark.parametrize("scheduler, said", [
    ({"partition": "nope"}, "invalid partition specified: nope"),
    ({"extra": "--no-such-option"}, "unrecognized option '--no-such-option'")])
def test_what_sbatch_refuses_leaves_no_workflow(cluster, scheduler, said):
    site = Site(cluster, "refused")
    spec = allocation_spec(cluster, "refused", {"a": "true"}, scheduler=scheduler)
    done = site.torc("submit", spec, "-o", site.output, ok=False)
    assert done.returncode == 1 and said in done.stderr
    assert re.search(r"workflow \d+ is gone again: fix this and submit again", done.stderr)
    script = re.search(r"sbatch --test-only ([^\s.]\S*[^\s.])", done.stderr)[1]
    assert said in cluster.run("sbatch", "--test-only", script).stderr
    assert site.json("workflows", "list") == {"workflows": []}


@pytest.mark.slurm
def test_a_workflow_that_has_an_allocation_stays_when_the_next_is_refused(cluster):
    site = Site(cluster, "second")
    path = allocation_spec(cluster, "second", {"a": "true"}, actions=[
        {"trigger_type": "on_workflow_start", "action_type": "schedule_nodes", "scheduler": name,
         "scheduler_type": "slurm", "num_allocations": 1} for name in ("s", "bad")])
    spec = json.loads(path.read_text())
    spec["slurm_schedulers"].append({**spec["slurm_schedulers"][0], "name": "bad", "partition": "no"})
    path.write_text(json.dumps(spec))
    done = site.torc("submit", path, "-o", site.output, ok=False)
    assert done.returncode == 1 and "gone again" not in done.stderr
    assert re.search(r'scheduler "bad"; .* 1 allocation submitted: Slurm job \d+; to request more:\n'
                     "  .*slurm schedule-nodes 1", done.stderr, re.S), done.stderr
    site.torc("wait", 1)
    assert site.statuses() == {"a": "completed"}


@pytest.mark.slurm
def test_logs_lie_in_whatever_directory_slurm_can_name(cluster):
    site = Site(cluster, "names")
    spec = allocation_spec(cluster, "names", {"a": "echo here"})
    directory = cluster.directory / "hpcuser" / "50%j 'of' \"größe\"; $(touch x)"
    site.torc("submit", spec, "-o", directory)
    assert "1 completed" in site.torc("wait", 1).stdout
    assert [path.suffix for path in sorted(directory.glob("slurm_output_wf1_sl*"))] == [".e", ".o"]
    assert not (cluster.directory / "hpcuser" / "x").exists()
    done = site.torc("submit", spec, "-o", f"{directory}\\n", ok=False)
    assert done.returncode == 2 and "Slurm accepts no backslash in log paths" in done.stderr
    done = site.torc("slurm", "schedule-nodes", 1, "-j", "../", ok=False)
    assert done.returncode == 2 and "'../' cannot begin a Slurm job's name" in done.stderr
    assert len(site.json("workflows", "list")["workflows"]) == 1


@pytest.mark.slurm
def test_an_allocation_that_will_never_begin_says_so(cluster):
    site = Site(cluster, "never")
    dash = ClusterDash(cluster, "--port", "0", "--url", f"http://localhost:{site.port}")
    for workflow_id, asked in ((1, {"walltime": "40:00:00"}), (2, {"nodes": 9})):
        [number] = site.submit(allocation_spec(cluster, "never", {"a": "true"}, scheduler=asked))
        said = site.torc("status", workflow_id).stdout
        shown = dash.json(f"/dash/allocations?workflow_id={workflow_id}")["lines"]
        cluster.run("scancel", number)
        assert [line for line in shown if f"and ask for less: scancel {number}" in line], shown
        assert re.search(rf"Slurm job {number} is pending \(Partition\w+\): it asks for more", said)
        assert f"so it will not start; cancel it, and ask for less:\n  scancel {number}\n" in said


@pytest.mark.slurm
def test_slurm_jobs_of_another_cluster_are_left_alone(cluster):
    site = Site(cluster, "clusters")
    spec = allocation_spec(cluster, "mine", {"a": "sleep 100"})
    [number] = site.submit(spec)
    site.until({"a": "running"})
    [record] = site.json("scheduled-compute-nodes", "list", 1)["scheduled_compute_nodes"]
    [node] = site.json("compute-nodes", "list", 1)["compute_nodes"]
    assert record["cluster"] == node["scheduler"]["cluster"] != "elsewhere"
    site.torc("create", allocation_spec(cluster, "theirs", {"b": "true"}))
    for workflow_id, slurm_job in ((2, number), (2, 999_999)):
        body = {"workflow_id": workflow_id, "scheduler_id": slurm_job, "scheduler_type": "slurm",
                "scheduler_config_id": 2, "status": "pending", "cluster": "elsewhere"}
        assert cluster.run("curl", "-sf", "-d", json.dumps(body), "-H", "Content-Type: "
                           f"application/json", f"http://{LOGIN}:{site.port}{torc.API_PREFIX}"
                           "/scheduled_compute_nodes").returncode == 0
    assert f"Slurm job {number} is pending on the cluster elsewhere" in site.torc("status", 2).stdout
    site.torc("workflows", "sync-status", 2)
    done = site.torc("cancel", 2, ok=False)
    assert done.returncode == 1
    assert f"Slurm job {number} is on the cluster elsewhere; cancel it there" in done.stderr
    assert site.statuses() == {"a": "running"}
    assert {one["status"] for one in site.json(
        "scheduled-compute-nodes", "list", 2)["scheduled_compute_nodes"]} == {"pending"}
    site.torc("cancel", 1)


@pytest.mark.slurm
def test_steps_that_are_canceled_together_are_signalled_together(cluster):
    site = Site(cluster, "together")
    trap = "trap 'echo TERM; exit 3' TERM; echo up; sleep 100 & wait"
    site.submit(allocation_spec(cluster, "together", {f"j{number}": trap for number in range(8)},
                                scheduler={"nodes": 2, "ntasks_per_node": 4},
                                execution_config={"mode": "slurm"}))
    site.until({f"j{number}": "running" for number in range(8)})
    logs = site.output / "job_stdio"
    until(lambda: [path.read_text() for path in logs.glob("*.o")] == ["up\n"] * 8)
    site.torc("cancel", 1)
    try:
        until(lambda: [path.read_text() for path in logs.glob("*.o")] == ["up\nTERM\n"] * 8)
    except AssertionError:
        raise AssertionError([path.read_text() for path in logs.glob("*.o")], site.logs()) from None
    assert set(site.statuses().values()) == {"canceled"}


@pytest.mark.slurm
def test_curl_on_a_compute_node_reaches_a_server_on_a_routable_name(cluster):
    port, _ = cluster.server("--database", "curl.db", "--host", LOGIN, "--port", "0")
    done = cluster.run("srun", "--time=1", "curl", "-s",
                       f"http://{LOGIN}:{port}/torc-service/v1/workflows")
    assert json.loads(done.stdout)["items"] == [], done.stderr
    done = cluster.run("srun", "--time=1", "curl", "-sS", f"http://kl1:{port}/torc-service/v1/workflows")
    assert done.returncode and "Could not resolve host" in done.stderr


@pytest.mark.slurm
def test_a_dashboard_on_a_socket_is_reached_by_ssh_and_by_nobody_else(cluster):
    home = cluster.directory / "hpcuser"
    path, log = home / "dash.sock", home / "dash.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            cluster.words("kl1", "hpcuser", [cluster.python, cluster.directory / "torc.py", "dash",
                                             "--standalone", "--socket", path]),
            cwd=home, stdout=file, stderr=file)
    cluster.started.append(process)
    until(lambda: "the dashboard of" in log.read_text(), 30)
    port = free_port()
    tunnel = subprocess.Popen(cluster.words("kl1", "hpcuser", [
        "ssh", "-F", "/home/hpcuser/.ssh/config", "-i", "/home/hpcuser/.ssh/id_ed25519", "-N", "-L",
        f"{port}:{path}", "hpcuser@c1"]), stderr=subprocess.DEVNULL)
    try:
        url = f"http://localhost:{port}"
        until(lambda: torc.DASH_HTML in cluster.run("curl", "-s", url + "/").stdout, 30)
        info = json.loads(cluster.run("curl", "-s", url + "/torc-service/v1/server_info").stdout)
        assert info["auth_required"] and [one for one in info["urls"] if "kl1.hsn.test" in one]
        home.chmod(0o755)                 # not the directory keeps the other user out
        done = cluster.run("curl", "-sS", "--unix-socket", path, "http://localhost/", user="other")
        assert done.returncode and "<html" not in done.stdout
        password = (home / ".torc" / "dash" / "password").read_text().strip()
        done = cluster.run("bash", "-c", f"cat {home}/.torc/dash/* ; cat /proc/[0-9]*/cmdline "
                           "/proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' '", user="other")
        assert "torc.py dash" in done.stdout and password not in done.stdout
        server = next(one for one in info["urls"] if "kl1.hsn.test" in one)
        done = cluster.torc("workflows", "list", "--url", server, user="other")
        assert done.returncode == 1 and "requires a user name and password" in done.stderr
        assert cluster.torc("workflows", "list", "--url", server).returncode == 0    # by the note
        spec = allocation_spec(cluster, "dashed", {"a": "true"})
        done = cluster.torc("submit", spec, "--url", server, "-o", home / "out_dashed")
        assert done.returncode == 0, done.stderr
        assert cluster.torc("wait", 1, "--url", server).returncode == 0
    finally:
        home.chmod(0o700)
        tunnel.terminate(), tunnel.wait()
    cluster.stop()
    until(lambda: not path.exists())


@pytest.mark.slurm
@pytest.mark.browser
def test_a_browser_submits_to_slurm(cluster, chromium):
    """The dashboard on the login host, the browser here: by a socket, which both see."""
    home = cluster.directory / "hpcuser"
    path, log = home / "sub.sock", home / "sub.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            cluster.words("kl1", "hpcuser", [cluster.python, cluster.directory / "torc.py", "dash",
                                             "--standalone", "--database", home / "sub.db",
                                             "--socket", path, "-o", home / "out_sub"]),
            cwd=home, stdout=file, stderr=file)
    cluster.started.append(process)
    until(lambda: "the dashboard of" in log.read_text(), 30)
    relay = SocketRelay(path)
    try:
        context = chromium.new_context()
        page = context.new_page()
        page.goto(f"http://localhost:{relay.port}/")
        page.get_by_role("button", name="New workflow").first.click()
        spec = json.loads(allocation_spec(cluster, "sub", {"a": "hostname", "b": "true"}).read_text())
        page.get_by_label("Specification", exact=True).fill(json.dumps(spec, indent=1))
        page.get_by_text("Valid: 2 jobs").wait_for()
        page.get_by_role("button", name="Create", exact=True).click()
        page.get_by_role("button", name="Initialize").first.click()
        page.get_by_text("2 jobs ready").first.wait_for()
        page.get_by_role("button", name="Submit to Slurm…").first.click()
        page.get_by_text("Workers reach the server at http://kl1.hsn.test:").wait_for()
        page.get_by_role("button", name=re.compile(r"^Submit \d+ allocation")).click()
        page.get_by_text("2 of 2 jobs done").wait_for(timeout=60_000)
        context.close()
    finally:
        relay.close()


class ClusterDash:
    """A user's dashboard on the login host, and what her curl gets of it there."""

    def __init__(self, cluster, *options, user="hpcuser", env=()):
        self.cluster, self.user, self.directory = cluster, user, cluster.directory / user
        self.log = self.directory / f"dash{len(cluster.started)}.log"
        with open(self.log, "w") as file:
            process = subprocess.Popen(
                cluster.words("kl1", user, ["env", *env, cluster.python, cluster.directory / "torc.py",
                                            "dash", "-o", self.directory / "out_dash", *options]),
                cwd=self.directory, stdout=file, stderr=file)
        cluster.started.append(process)
        until(lambda: "the dashboard of" in self.log.read_text() or process.poll() is not None, 30)
        assert process.poll() is None, self.log.read_text()
        self.url, self.words = "http://localhost", ["--unix-socket", self.directory / "d.sock"]
        if link := re.search(r"(http://[^/\s]+)/\?token=\S+", self.log.read_text()):
            self.url, self.words = link[1], ["-b", "jar", "-c", "jar"]
            self.curl(link[0].replace(link[1], ""))

    def curl(self, path, body=None, user=None, words=None):
        """What curl prints: the body, and the status in a line below."""
        sent = [] if body is None else ["-H", f"Origin: {self.url}", "-d", json.dumps(body)]
        return self.cluster.run("curl", "-s", "-w", "\n%{http_code}", *(
            self.words if words is None else words), *sent, self.url + path,
            user=user or self.user).stdout

    def json(self, path, body=None):
        """The JSON of a good answer."""
        text, _, status = self.curl(path, body).rpartition("\n")
        assert status == "200", (path, text, self.log.read_text())
        return json.loads(text)

    def workflows(self):
        """Names of the workflows that it shows."""
        return [one["name"] for one in self.json("/torc-service/v1/workflows")["items"]]

    def create(self, spec):
        """Create and initialize a workflow by its pages; its id."""
        made = self.json("/dash/create", {"spec": spec.read_text()})["id"]
        self.json("/dash/do/initialize", {"workflow_id": made})
        return made

    def until_done(self, workflow_id):
        """Wait until all jobs of a workflow have ended; its counts."""
        path = f"/torc-service/v1/workflows/{workflow_id}/counts"
        return until(lambda: (lambda counts: counts["is_complete"] and counts)(self.json(path)), 90)


@pytest.mark.slurm
@pytest.mark.parametrize("way", ["one machine", "login node", "routable name", "team", "TLS",
                                 "standalone"])
def test_the_dashboard_in_each_way_to_use_torc(cluster, way, certificates):
    home, env, host = cluster.directory / "hpcuser", (), {"one machine": "127.0.0.1",
                                                          "routable name": LOGIN}
    options = ["--database", f"{way.split()[0]}.db", "--host", host.get(way, "0.0.0.0"), "--port", "0"]
    asked = []
    if way in ("login node", "team"):
        for user in ("hpcuser", "other"):
            cluster.run("bash", "-c", f"echo '{PASSWORD}' | {cluster.python} "
                        f"{cluster.directory}/torc.py htpasswd add --file dash_users --password-stdin "
                        f"--cost 5 {user}")
        options += ["--auth-file", "dash_users", "--require-auth"]
        env = MINE
    if way == "team":
        options.append("--enforce-access-control")
    if way == "TLS":
        for name in ("good.pem", "good.key", "ca.pem"):
            shutil.copy(certificates / name, home / name)
            shutil.chown(home / name, "hpcuser", "hpcuser")
        options += ["--https", "--tls-cert", "good.pem", "--tls-key", "good.key"]
        env = ["TORC_TLS_CA_CERT=ca.pem"]
    if way == "standalone":
        asked = ["--standalone", "--database", home / "alone.db"]
    else:
        port, _ = cluster.server(*options)
        where = LOGIN if way == "routable name" else "localhost"
        asked = ["--url", f"http{'s' if way == 'TLS' else ''}://{where}:{port}"]
    dash = ClusterDash(cluster, *asked, *(["--socket", home / "d.sock"] if way == "team" else [
        "--port", "0"]), env=env)
    made = dash.create(allocation_spec(cluster, f"by {way}".replace(" ", "_"), {"a": "hostname"}))
    if way == "one machine":              # workers on compute nodes would not reach it
        assert "listens on this machine only" in dash.curl("/dash/do/submit", {"workflow_id": made})
        dash.json("/dash/do/run", {"workflow_id": made})
    else:
        dash.json("/dash/do/submit", {"workflow_id": made})
    assert dash.until_done(made)["completed"] == 1
    assert dash.json("/dash/log?job=1&stream=stdout")["text"].strip() in (
        ["kl1"] if way == "one machine" else ["c1", "c2"])
    for user in ("other", "hpcuser"):     # without the cookie of the link nobody gets in
        text = dash.curl("/torc-service/v1/workflows", user=user, words=dash.words[:2] if
                         way == "team" else [])
        assert text.endswith("\n401" if way != "team" else "\n000" if user == "other" else "\n200")
    seen = cluster.run("bash", "-c", f"cat {home}/*.log {home}/.torc/*/* {home}/out_dash/* "
                       "/proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' '",
                       user="other").stdout
    secrets = [PASSWORD, "token="]
    if way == "standalone":
        secrets.append((home / ".torc" / "dash" / "password").read_text().strip())
    assert "torc.py dash" in seen and not [secret for secret in secrets if secret in seen]
    if way == "team":
        theirs = ClusterDash(cluster, *asked, "--socket", cluster.directory / "other" / "d.sock",
                             user="other", env=["TORC_USERNAME=other", f"TORC_PASSWORD={PASSWORD}"])
        assert (dash.workflows(), theirs.workflows()) == (["by_team"], [])


class SocketRelay:
    """A TCP port of this host that leads to a UNIX socket, as ssh -L makes one."""

    def __init__(self, path):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.path = self.listener.getsockname()[1], str(path)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                far = socket.socket(socket.AF_UNIX)
                far.connect(self.path)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self.copy, args=(one, other), daemon=True).start()

    @staticmethod
    def copy(one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def close(self):
        self.listener.close()


@pytest.mark.slurm
def test_a_file_that_compute_nodes_do_not_see_is_named(cluster):
    site = Site(cluster, "unseen")
    spec = allocation_spec(cluster, "unseen", {"a": "true"})
    text = site.torc("submit", spec, "--dry-run").stdout.partition("\n")[2]
    script = cluster.directory / "hpcuser" / "unseen.sh"
    script.write_text(text.replace(str(cluster.directory / "torc.py"), "/nowhere/torc.py"))
    shutil.chown(script, "hpcuser", "hpcuser")
    done = cluster.run("srun", "--time=1", "bash", script)
    assert done.returncode and "/nowhere/torc.py cannot be read there: put torc on a file system" in \
        done.stderr


@pytest.mark.slurm
def test_the_cluster_describes_itself(cluster):
    shown = json.loads(cluster.torc("-f", "json", "hpc", "partitions", "slurm").stdout)
    assert [(one["name"], one["cpus_per_node"], one["memory_mb"], one["max_walltime_secs"],
             one["max_nodes"], one["requires_explicit_request"]) for one in shown["partitions"]] == [
        ("debug", 4, 4000, 3600, 2, True), ("short", 4, 4000, 600, 2, False)]
    done = cluster.torc("hpc", "generate", "-o", ".torc/hpc/here.json")
    assert "profile torctest, 2 partitions, for hosts like kl1" in done.stdout, done.stderr
    assert cluster.torc("hpc", "detect").stdout == "torctest (torctest)\n"
    done = cluster.torc("hpc", "match", "--cpus", "8")
    assert "no partition of torctest accepts 8 CPUs (debug and short: only 4 CPUs a node)" in done.stderr
    cluster.run("rm", "-r", ".torc/hpc")


@pytest.mark.slurm
def test_slurm_takes_what_is_planned_for_it(cluster):
    spec = {"name": "s", "resource_requirements": [
        {"name": "small", "num_cpus": 1, "memory": "500m", "runtime": "PT2M"},
        {"name": "wide", "num_cpus": 2, "memory": "1g", "runtime": "PT3M", "num_nodes": 2}],
        "jobs": [{"name": "w{i}", "parameters": {"i": "1:20"}, "command": "true",
                  "resource_requirements": "small"},
                 {"name": "m", "command": "true", "depends_on_regexes": ["^w"],
                  "resource_requirements": "wide"}]}
    path = cluster.directory / "hpcuser" / "planned.json"
    path.write_text(json.dumps(spec))
    path.chmod(0o644)
    done = cluster.torc("-f", "json", "slurm", "plan-allocations", path.name, "-a", "torc")
    rows = json.loads(done.stdout)["schedulers"]
    assert [(row["partition"], row["nodes"], row["num_allocations"]) for row in rows] == [
        ("short", 1, 5), ("short", 2, 1)]
    for row in rows:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", row["predicted_start"]), row
        assert row["idle_nodes"] in (0, 1, 2)
    done = cluster.torc("slurm", "generate", path.name, "-a", "torc", "-o", "out.json")
    assert done.returncode == 0, done.stderr
    assert cluster.torc("create", "out.json", "--dry-run").returncode == 0


# ==================================================================================================
# Faults: what must hold when processes are killed at random moments
# ==================================================================================================

TRACE = ('echo "$TORC_ATTEMPT_ID start $(date +%s%N)" >> trace/$TORC_JOB_NAME; sleep {0}; '
         'echo "$TORC_ATTEMPT_ID end $(date +%s%N)" >> trace/$TORC_JOB_NAME')


def traced_spec(directory, number, pause="0.02"):
    """A spec of `number` jobs in two layers; every attempt notes start and end in a file of its
    job."""
    (directory / "trace").mkdir()
    first = number // 2
    jobs = [{"name": f"j{index}", "command": TRACE.format(pause),
             **({"depends_on": [f"j{index - first}"]} if index >= first else {})}
            for index in range(number)]
    path = directory / "traced.json"
    path.write_text(json.dumps({"name": "traced", "jobs": jobs}))
    return path


def start_run(directory, *words, env=None):
    """`torc run ...` as a process with its output in run.log."""
    with open(directory / "run.log", "ab") as log:
        return subprocess.Popen([*COMMAND, "run", *map(str, words)], cwd=directory, stdout=log,
                                stderr=log, stdin=subprocess.DEVNULL,
                                env={**os.environ, **(env or {})})


@pytest.fixture
def hook():
    """A web server that keeps what is posted to it: .url, .posts, .status of its answers."""
    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            known.posts.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(known.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    known = types.SimpleNamespace(url=f"http://127.0.0.1:{made.server_port}/hook?token=s3cret", posts=[], status=200)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield known
    made.shutdown()
    made.server_close()


def test_a_url_is_told_once_when_a_run_is_over(hook, tmp_path):
    spec = {"name": "w", "jobs": [{"name": "a", "command": "echo ${TORC_NOTIFY:-hidden}; tr '\\0' ' ' < /proc/$PPID/cmdline"}]}
    (tmp_path / "w.json").write_text(json.dumps(spec))
    assert start_run(tmp_path, "w.json", env={"TORC_NOTIFY": hook.url}).wait(60) == 0
    assert hook.posts == [("/hook?token=s3cret", {"workflow_id": 1, "state": "done", "text": "Workflow 1 is done: 1 completed"})]
    [output] = (tmp_path / "torc_output" / "job_stdio").glob("*.o")
    assert output.read_text().startswith("hidden\n")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    for hook.status, said in ((404, "HTTPError Not Found"), (0, "URLError")):
        url = hook.url if hook.status else f"http://127.0.0.1:{free_port()}/s3cret"
        done = subprocess.run([*COMMAND, "wait", "1"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                              env={**os.environ, "TORC_NOTIFY": url})
        assert done.returncode == 0 and done.stdout == "Workflow 1: 1 completed\n"
        assert f"no notice was sent: {said}" in done.stderr and "s3cret" not in done.stderr


def test_a_command_is_told_without_a_shell(cli, local, tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:{os.environ['PATH']}")
    tool = tmp_path / "tools" / "mail"
    tool.write_text("#!/bin/sh\nprintf '%s|' \"$@\" > told; cat >> told; exit ${CODE:-0}\n")
    tool.chmod(0o755)
    workflow_id, ids = make(local, {"a": [], "b": []})
    end_jobs(local, workflow_id, ids, a=0, b=1)
    text = f"Workflow {workflow_id} is failed: 1 completed, 1 failed"
    facts = {"workflow_id": workflow_id, "state": "failed", "text": text}
    for target, words in (("mail:me@example.org", ["-s", text, "me@example.org"]),
                          ("mail '$(touch x); {state}' {other} \"{text}\"", ["$(touch x); failed", "{other}", text])):
        cli("wait", workflow_id, "--notify", target, ok=1)
        told, _, sent = Path("told").read_text().rpartition("|")
        assert told.split("|") == words and json.loads(sent) == facts
    assert not os.path.exists("x")
    monkeypatch.setenv("CODE", "7")
    _, out, err = cli("wait", workflow_id, "--notify", "mail s3cret", ok=1)
    assert "no notice was sent: CalledProcessError" in err and "s3cret" not in err
    monkeypatch.setattr(torc, "NOTICE_S", 0.1)
    assert "TimeoutExpired" in cli("wait", workflow_id, "--notify", "sleep 60", ok=1)[2]
    _, out, err = cli("run", "--example", "hello", "--notify", "no-such-program {text}", ok=2)
    assert "there is no program ['no-such-program'] here" in err and len(list(local.items("/workflows"))) == 1
    tool.unlink()
    if not shutil.which("mail"):
        assert "there is no program ['mail'] here" in cli("wait", 1, "--notify", "mail:me", ok=2)[2]


def test_a_watch_tells_once_that_a_workflow_is_stuck_and_once_that_it_has_ended(client, tmp_path, monkeypatch):
    workflow_id, ids = make(client, {"a": []})
    complete(client, ids["a"], workflow_id, make_node(client, workflow_id, is_active=False), 1, "pending_failed")
    told = []
    monkeypatch.setattr(torc, "send_notice", lambda args, client, workflow_id, code: told.append(code))
    args = torc.parse_command(torc.COMMANDS["watch"], [], [str(workflow_id), "-o", str(tmp_path), "-s", "-p", "1"])
    looks, look = [], torc.Watcher.look

    def again(self):
        look(self)
        looks.append(0)
        if len(looks) == 3:
            torc.plan_resolve(client, [ids["a"]], torc.Wishes(decision="fail")).choices[0].do(client)

    monkeypatch.setattr(torc.Watcher, "look", again)
    args.workflow_id = workflow_id
    assert torc.COMMANDS["watch"].function(args, client) == 1 and told == [3, 1]


def test_a_detached_run_outlives_its_terminal(tmp_path):
    pexpect = pytest.importorskip("pexpect")
    command = f"until [ -e {tmp_path}/go ]; do sleep 0.05; done"
    (tmp_path / "w.json").write_text(json.dumps({"name": "w", "jobs": [{"name": "a", "command": command}]}))
    terminal = pexpect.spawn(COMMAND[0], [*COMMAND[1:], "run", "w.json", "--detach"], cwd=str(tmp_path), timeout=30)
    terminal.expect(r"runs in the background \(pid (\d+)\), its log is (\S+)\r\n")
    pid, log = int(terminal.match[1]), Path(terminal.match[2].decode())
    for name in ("status", "wait", "cancel"):
        terminal.expect(rf"torc \S* ?{name} 1|{name} 1")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    status = Path(f"/proc/{pid}/status").read_text()
    assert os.getsid(pid) == pid and int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16) & 1     # SIGHUP
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null" and os.readlink(f"/proc/{pid}/fd/2") == str(log)
    assert log.parent == tmp_path / "torc_output" and os.stat(log).st_mode & 0o777 == 0o600
    os.kill(pid, signal.SIGHUP)
    (tmp_path / "go").touch()
    wait = subprocess.run([*COMMAND, "wait", "1"], cwd=tmp_path, timeout=60, capture_output=True, text=True)
    assert wait.returncode == 0 and wait.stdout == "Workflow 1: 1 completed\n"
    until(lambda: "completed after" in log.read_text())


def test_a_detached_run_tells_at_once_what_is_wrong_and_can_be_canceled(tmp_path):
    def detach(spec, *words):
        (tmp_path / "w.json").write_text(json.dumps(spec))
        return subprocess.run([*COMMAND, "run", "w.json", "--detach", *words], cwd=tmp_path, timeout=60,
                              capture_output=True, text=True, stdin=subprocess.DEVNULL)

    bad = detach({"name": "w", "jobs": [{"nam": "a", "command": "true"}]})
    assert bad.returncode == 1 and "unknown field 'nam'" in bad.stderr
    missing = detach({"name": "w", "files": [{"name": "f", "path": "f.txt"}],
                      "jobs": [{"name": "a", "command": "true", "input_files": ["f"]}]})
    assert missing.returncode == 1 and 'input files missing: "f.txt"' in missing.stderr
    assert "Dry run" in detach({"name": "w", "jobs": [{"name": "a", "command": "true"}]}, "--dry-run").stdout
    assert not list(tmp_path.rglob("run_wf*"))
    done = detach({"name": "w", "jobs": [{"name": "a", "command": "sleep 300"}]}, "-f", "json", "-j", "1")
    found = json.loads(done.stdout)
    assert sorted(found) == ["log", "pid", "workflow_id"] and done.returncode == 0
    subprocess.run([*COMMAND, "cancel", "1"], cwd=tmp_path, timeout=60, check=True)
    until(lambda: torc.process_start(found["pid"]) is None)
    assert "ended with failures" in Path(found["log"]).read_text()


def processes_in(directory):
    """pids of processes (not ours) whose working directory is `directory`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/cwd") == str(directory) and int(pid) != os.getpid():
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found.append(int(pid))
    return found


def check_traces(directory, client, workflow_id):
    """Every job completed; no attempt twice, none overlapping another, none that ended without its
    result; no process left."""
    log = (directory / "run.log").read_text()
    assert set(statuses(client, workflow_id).values()) == {"completed"}, log
    results = {}
    for result in client.items("/results", workflow_id=workflow_id, all_runs=True):
        results.setdefault(result["job_id"], {})[result["attempt_id"]] = result["return_code"]
    for job in client.items("/jobs", workflow_id=workflow_id):
        lines = [line.split() for line in (directory / "trace" / job["name"]).read_text().splitlines()]
        started = [int(attempt) for attempt, what, _ in lines if what == "start"]
        ended = [int(attempt) for attempt, what, _ in lines if what == "end"]
        assert len(started) == len(set(started)), f"{job['name']}: an attempt happened twice: {lines}"
        assert started == sorted(started), f"{job['name']}: attempts out of order: {lines}"
        last = 0
        for attempt, what, when in lines:
            assert int(when) >= last, f"{job['name']}: attempts overlap: {lines}"
            last = int(when)
            if what == "start":
                current = attempt
            else:
                assert attempt == current, f"{job['name']}: attempts overlap: {lines}"
        missing = set(ended) - set(results.get(job["id"], {}))
        assert not missing, f"{job['name']}: attempts without result: {missing}"
        assert results[job["id"]][job["attempt_id"]] == 0
    until(lambda: not processes_in(directory), 20, "the end of all processes")


@pytest.mark.slow
def test_ten_kills_of_the_server_lose_and_repeat_nothing(tmp_path):
    chance = random.Random(1)
    spec = traced_spec(tmp_path, 300)
    server = Server(tmp_path / "x.db")
    runner = start_run(tmp_path, spec, "--url", server.url, "--max-parallel-jobs", 4)
    try:
        until(lambda: server.client().page("/workflows")["total_count"], what="the workflow")
        until(lambda: server.client().page("/results", workflow_id=1)["total_count"])
        for kill in range(10):
            time.sleep(chance.uniform(0.0, 0.25))            # the moment is to be random
            server.kill()
            server = Server(tmp_path / "x.db", port=server.port if kill % 2 else 0)
        assert runner.wait(120) == 0, (tmp_path / "run.log").read_text()
        check_traces(tmp_path, server.client(), 1)
    finally:
        runner.kill(), runner.wait()
        server.stop()
    store = torc.Store(server.database)
    check_store(store)
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["local", "http"])
def test_ten_kills_of_the_runner_lose_and_repeat_nothing(tmp_path, mode):
    chance = random.Random(2)
    spec = traced_spec(tmp_path, 200, "0.05")
    database = str(tmp_path / "x.db")
    server = Server(database) if mode == "http" else None
    where = ["--url", server.url] if server else ["--database", database]
    client = server.client() if server else torc.LocalClient(database)
    runner = start_run(tmp_path, spec, *where, "--max-parallel-jobs", 4)
    try:
        until(lambda: client.page("/workflows")["total_count"], what="the workflow")
        for _ in range(10):
            time.sleep(chance.uniform(0.1, 0.5))             # the moment is to be random
            runner.kill(), runner.wait()
            runner = start_run(tmp_path, 1, *where, "--max-parallel-jobs", 4)
        assert runner.wait(120) == 0, (tmp_path / "run.log").read_text()
        check_traces(tmp_path, client, 1)
    finally:
        runner.kill(), runner.wait()
        client.close()
        if server:
            server.stop()


class FaultGame:
    """A workflow under random faults: its server, two runners and their guardians are killed, stopped and ended,
    the disk of their output fills, its mount is lost, the server moves."""

    KINDS = {                             # what a job does between its two lines of trace, how it ends
        "quick": ("sleep 0.02", 0), "slow": ("sleep 0.4", 0), "fails": ("sleep 0.05", 3),
        "traps": ("trap 'exit 4' TERM; sleep 0.3 & wait $!", 0), "group": ("sleep 0.2 & sleep 0.1; wait", 0)}

    def __init__(self, directory, seed, jobs):
        self.directory, self.chance = directory, random.Random(seed)
        self.output = directory / "torc_output"
        (directory / "trace").mkdir(), self.output.mkdir()
        self.mounted = os.geteuid() == 0
        if self.mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "game", self.output], check=True)
        kinds = list(self.KINDS)
        spec = write_spec(directory, {f"{kind}{number}": (
            f'echo "$TORC_ATTEMPT_ID start $(date +%s%N)" >> trace/$TORC_JOB_NAME; {self.KINDS[kind][0]}; '
            f'echo "$TORC_ATTEMPT_ID end $(date +%s%N)" >> trace/$TORC_JOB_NAME; exit {self.KINDS[kind][1]}')
            for number in range(jobs) for kind in (kinds[number % len(kinds)],)},
            compute_node_wait_for_new_jobs_seconds=30)
        self.server = Server(directory / "x.db")
        self.runners = [start_run(directory, spec, "--url", self.server.url, "--max-parallel-jobs", 3)]
        until(lambda: self.client().page("/workflows")["total_count"], what="the workflow")
        self.tend()

    def client(self):
        return self.server.client()

    def tend(self):
        """Two runners are at work."""
        self.runners = [one for one in self.runners if one.poll() is None]
        while len(self.runners) < 2:
            self.runners.append(start_run(self.directory, 1, "--url", self.server.url, "--max-parallel-jobs", 3))

    def pause(self, least=0.0, most=0.2):
        time.sleep(self.chance.uniform(least, most))         # the moment is to be random

    def move(self):
        """The server dies and comes back, perhaps elsewhere."""
        self.server.kill()
        self.pause()
        self.server = Server(self.directory / "x.db", port=self.chance.choice([0, self.server.port]))

    def freeze(self, process):
        process.send_signal(signal.SIGSTOP)
        self.pause()
        process.send_signal(signal.SIGCONT)

    def end(self, number):
        self.chance.choice(self.runners).send_signal(number)

    def kill_guardian(self):
        runner = self.chance.choice(self.runners)
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                words = torc.process_stat(pid)
                if words and int(words[1]) == runner.pid and b"torc.py\0run" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)

    def fill(self):
        with contextlib.suppress(OSError), open(self.output / "ballast", "wb", buffering=0) as file:
            while self.mounted and file.write(b"x" * 65536):
                pass
        self.pause(0.1, 0.4)
        (self.output / "ballast").unlink(missing_ok=True)

    def lose(self):
        with contextlib.suppress(OSError):
            (self.output / "job_stdio").rename(self.output / "lost")
            self.pause(0.1, 0.4)
            (self.output / "lost").rename(self.output / "job_stdio")

    def play(self):
        """One round."""
        self.chance.choice([
            self.move, self.fill, self.lose, self.kill_guardian,
            lambda: self.freeze(self.server.process), lambda: self.freeze(self.chance.choice(self.runners)),
            lambda: self.end(signal.SIGKILL), lambda: self.end(signal.SIGKILL),
            lambda: self.end(signal.SIGTERM), lambda: self.end(signal.SIGINT)])()
        self.pause(0, 0.1)
        self.tend()

    def close(self):
        for runner in self.runners:
            runner.kill(), runner.wait()
        self.server.stop()
        if self.mounted:
            subprocess.run(["umount", "-l", self.output], check=True)


@pytest.mark.slow
def test_a_game_of_faults_loses_and_repeats_nothing(tmp_path):
    """200 rounds; the traces of all jobs must agree with what is said of them."""
    seed = int(os.environ.get("TORC_TEST_SEED", time.time_ns() % 10**6))
    print(f"TORC_TEST_SEED={seed}")
    game = FaultGame(tmp_path, seed, 1000)
    try:
        for _ in range(200):
            game.play()
        until(lambda: [game.tend(), game.client().get("/workflows/1/is_complete")["is_complete"]][1], 240,
              "the end of the workflow")
        client, log = game.client(), (tmp_path / "run.log").read_text()
        results = {}
        for row in client.items("/results", workflow_id=1, all_runs=True):
            results.setdefault(row["job_id"], {})[row["attempt_id"]] = row
        for job in client.items("/jobs", workflow_id=1):
            name, kind = job["name"], job["name"].rstrip("0123456789")
            code = game.KINDS[kind][1]
            last = results[job["id"]][job["attempt_id"]]
            assert (job["status"], last["return_code"]) == ("failed" if code else "completed", code), (name, last, log)
            lines = [line.split() for line in (tmp_path / "trace" / name).read_text().splitlines()]
            started = [int(attempt) for attempt, what, _ in lines if what == "start"]
            assert started == sorted(set(started)), f"{name}: an attempt happened twice: {lines}"
            current = None
            for attempt, what, _ in lines:
                assert what == "start" or attempt == current, f"{name}: attempts overlap: {lines}"
                current = attempt
            ended = {int(attempt) for attempt, what, _ in lines if what == "end"}
            assert job["attempt_id"] in ended, f"{name}: its last attempt has no end: {lines}"
            for attempt in ended - {job["attempt_id"]}:      # it was ended between its end and its exit
                assert results[job["id"]][attempt]["return_code"] in (-128, 143, 137, 130, 4, code), (name, lines)
        # SIGINT may come while Python still reads the program, also while it handles another exception.
        log = re.sub(r"Traceback \((?:(?!Traceback \().)*?\n\nDuring handling of the above exception.*?\n\n", "", log,
                     flags=re.S)
        assert [text for text in log.split("Traceback (")[1:] if "\nKeyboardInterrupt" not in text] == []
        assert "unexpected error" not in log
    finally:
        game.close()
    until(lambda: not processes_in(tmp_path), 30, "the end of all processes")
    store = torc.Store(game.server.database)
    check_store(store)
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_runner_does_not_orphan_its_jobs(tmp_path, number, code):
    spec = traced_spec(tmp_path, 8, "1.5")
    database = str(tmp_path / "x.db")
    client = torc.LocalClient(database)
    runner = start_run(tmp_path, spec, "--database", database, "--max-parallel-jobs", 4)
    until(lambda: len(list((tmp_path / "trace").iterdir())) == 4)
    runner.send_signal(number)
    assert runner.wait(30) == code, (tmp_path / "run.log").read_text()
    until(lambda: not processes_in(tmp_path), what="the end of all processes")
    results = client.page("/results", workflow_id=1, all_runs=True)["items"]
    assert [(item["status"], item["attempt_id"]) for item in results] == [("terminated", 1)] * 4
    jobs = client.page("/jobs", workflow_id=1)["items"]
    assert [(job["status"], job["attempt_id"]) for job in jobs[:4]] == [("ready", 2)] * 4
    assert client.page("/compute_nodes", workflow_id=1)["items"][0]["is_active"] is False
    runner = start_run(tmp_path, 1, "--database", database, "--max-parallel-jobs", 8)
    assert runner.wait(60) == 0, (tmp_path / "run.log").read_text()
    check_traces(tmp_path, client, 1)
    client.close()


def test_children_of_a_canceled_job_do_not_survive(tmp_path):
    spec = tmp_path / "s.json"
    spec.write_text(json.dumps({"name": "w", "jobs": [
        {"name": "a", "command": "sleep 300 & (sleep 301 &) ; setsid sleep 302 & touch started; wait"},
        {"name": "b", "command": "true"}]}))
    database = str(tmp_path / "x.db")
    client = torc.LocalClient(database)
    runner = start_run(tmp_path, spec, "--database", database, "--max-parallel-jobs", 1)
    until((tmp_path / "started").exists)
    job = client.page("/jobs", workflow_id=1)["items"][0]
    client.post(f"/jobs/{job['id']}/stop", status="canceled")
    assert runner.wait(60) == 1, (tmp_path / "run.log").read_text()
    assert statuses(client, 1) == {"a": "canceled", "b": "completed"}
    until(lambda: not processes_in(tmp_path), what="the end of all processes")
    assert client.page("/results", workflow_id=1, job_id=job["id"])["total_count"] == 1
    client.close()


def test_a_client_killed_in_the_middle_of_a_creation_leaves_nothing(server):
    """The connection breaks after half of the body, as when the client is killed."""
    body = json.dumps({"workflow": {"name": "w", "user": "u"},
                       "jobs": [{"name": f"j{n}", "command": "true"} for n in range(20_000)]})
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall((f"POST {API}/workflow_specs HTTP/1.1\r\nHost: x\r\nContent-Type: "
                      f"application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode())
        sock.sendall(body[:len(body) // 2].encode())
    client = server.client()
    assert client.page("/workflows")["total_count"] == 0
    assert client.post("/workflows", {"name": "w", "user": "u"})["id"] == 1


# ==================================================================================================
# 17 Python
# ==================================================================================================


@pytest.mark.parametrize("name", ["Workflow", "map"])
def test_the_examples_of_the_docstrings_are_true(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [found] = doctest.DocTestFinder(recurse=False).find(getattr(torc, name), name, globs={"torc": torc})
    runner = doctest.DocTestRunner()
    runner.run(found, out=lambda text: pytest.fail(text))
    assert runner.tries > 0


def test_the_builtin_map_is_hidden_from_nobody():
    assert torc.map is torc.map_items and "map" not in vars(torc)
    with pytest.raises(AttributeError, match="module 'torc' has no attribute 'filter'"):
        torc.filter


def test_what_is_wrong_is_raised_with_all_that_a_command_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(torc.TorcError, match="unknown field 'nam'"):
        torc.run({"name": "w", "jobs": [{"nam": "a", "command": "true"}]})
    with pytest.raises(torc.TorcError, match="nope.yaml: No such file"):
        torc.run("nope.yaml")
    with pytest.raises(torc.TorcError, match="unknown field 'memry'"):
        torc.map(len, ["a"], memry="1g")
    with pytest.raises(torc.Unreachable, match="there is no database torc_output/torc.db yet"):
        torc.Workflow(9).status()
    assert torc.run({"name": "w", "jobs": []}).wait() == 0 and torc.map(len, []) == []
    with pytest.raises(torc.NotFound):
        torc.Workflow(9).status()


MAP_SCRIPT = """
import sys
sys.path.insert(0, ROOT)
import torc

def inverse(number):
    if number == 9:
        return lambda: 0                  # which cannot be pickled
    return 1 / number

def work():
    print(torc.map(inverse, [4, 1, 2], server=SERVER, max_parallel_jobs=2, output_dir="out"))
    for items in ([1, 0], [9]):
        try:
            torc.map(inverse, items, server=SERVER, output_dir="out")
        except Exception as error:
            print(type(error).__name__, error, str(error.__cause__).count("in inverse"))

"""


def test_a_map_runs_a_scripts_function_in_jobs(client, tmp_path):
    server = None if client.is_local else client.where
    text = MAP_SCRIPT.replace("ROOT", repr(str(ROOT))).replace("SERVER", repr(server))
    script = tmp_path / "script.py"
    script.write_text(text + 'if __name__ == "__main__":\n    work()\n')
    done = subprocess.run([PYTHON, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    first, second, third = done.stdout.splitlines()[:3]
    assert first == "[0.25, 1.0, 0.5]" and second == "ZeroDivisionError division by zero 1", done
    assert re.search("pickle|local object", third) and third.endswith(" 0")
    files = list((tmp_path / "out").glob("map_*"))
    assert len(files) == 3 + 6 and not [path for path in files if os.stat(path).st_mode & 0o077]


def test_a_map_without_a_guard_is_told_and_does_not_repeat_itself(tmp_path):
    text = MAP_SCRIPT.replace("ROOT", repr(str(ROOT))).replace("SERVER", "None")
    (tmp_path / "script.py").write_text(text + "torc.map(inverse, [1], output_dir='out')\n")
    done = subprocess.run([PYTHON, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "if __name__ == '__main__':" in done.stderr.rpartition("RuntimeError")[2]
    assert len(list((tmp_path / "out").glob("map_*"))) == 2


# ==================================================================================================
# README and packaging
# ==================================================================================================

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A directory with README's files in it, and torc, torc-server and python3 on the PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, words in (("torc", LAUNCHER), ("torc-server", f"{LAUNCHER} server"), ("python3", "")):
        path = tools / name
        path.write_text(f'#!/bin/sh\nexec {PYTHON} {words} "$@"\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for block in re.findall(r"^```yaml\n(.*?)^```", README, re.S | re.M):
        name = re.match(r"# (\S+)\n", block)
        if name:
            (work / name[1]).write_text(block)
    return work


@pytest.mark.slow
def test_every_command_of_the_readme_does_what_it_says(shell):
    background, ports, many = [], {}, shell.parent / "many"
    many.mkdir()
    try:
        for block in re.finditer(r"^```console\n(.*?)^```", README, re.S | re.M):
            first = block.start() < README.index("## First run")     # which begins anew
            for line in re.findall(r"^\$ (.*)$", block[1], re.M):
                line = re.sub(r"818\d", lambda port: ports.setdefault(port[0], str(free_port())), line)
                command, _, note = line.partition("  # exits ")
                if command.endswith("&"):
                    process = subprocess.Popen(["bash", "-c", "exec " + command[:-1]], text=True,
                                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                    background.append(process)
                    assert process.stdout.readline().startswith("TORC_SERVER_PORT=")
                    continue
                done = subprocess.run(["bash", "-c", command], capture_output=True, text=True,
                                      cwd=many if first else shell, stdin=subprocess.DEVNULL,
                                      timeout=120)
                assert done.returncode == int(note or 0), f"{line}\n{done.stdout}{done.stderr}"
    finally:
        for process in background:
            process.terminate(), process.communicate()


SLURM_BLOCKS = re.findall(r"^```console slurm\n(.*?)^```", README, re.S | re.M)


def block_script(block):
    """A bash script of a block's commands, which ends at the first that does not end as it says."""
    lines = ["set -u", "trap 'kill $(jobs -p) 2> /dev/null; wait' EXIT"]
    for number, line in enumerate(re.findall(r"^\$ (.*)$", block, re.M)):
        command, _, code = line.partition("    # exits ")
        if command.endswith("&"):
            lines += [f"{command[:-1]} > server{number} &",
                      f"until grep -q TORC_ server{number}; do sleep 0.05; kill -0 $! || "
                      "exit 90; done"]
        else:
            lines += [command, f"code=$?; [ $code = {code or 0} ] || {{ echo \"$code from: "
                      f"{number}\" >&2; exit 91; }}"]
    return "\n".join(lines) + "\n"


@pytest.mark.slurm
@pytest.mark.parametrize("number", range(len(SLURM_BLOCKS)))
def test_the_readmes_commands_for_clusters_do_what_they_say(cluster, number):
    home = cluster.directory / "hpcuser" / f"readme{number}"
    tools = home / "tools"
    tools.mkdir(parents=True)
    for name, words in (("torc", ""), ("torc-server", " server"), ("torc-dash", " dash")):
        (tools / name).write_text(f'#!/bin/sh\nexec {cluster.python} {cluster.directory}/torc.py{words} '
                                  '"$@"\n')
        (tools / name).chmod(0o755)
    for text in re.findall(r"^```yaml\n(.*?)^```", README, re.S | re.M):
        (home / re.match(r"# (\S+)\n", text)[1]).write_text(text)
    script = block_script(SLURM_BLOCKS[number].replace("login1.example.org", LOGIN))
    (home / "script").write_text(script)
    subprocess.run(["chown", "-R", "hpcuser:", home], check=True)
    done = cluster.run("bash", "-c", f"cd {home} && HOME={home} PATH={tools}:$PATH USER=hpcuser bash "
                       "script", timeout=170)
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"


def test_torc_client_gives_a_password_as_the_readme_says(tmp_path, passwords):
    python = outside_python("torc.openapi_client")
    [text] = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    with guarded(tmp_path / "x.db", passwords, "--require-auth").closing() as server:
        text = re.sub(r'host=".*?"', f"host={server.url!r}", text)
        done = subprocess.run([python, "-c", text], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "TORC_PASSWORD": ALICE}, timeout=60)
        assert done.stdout == "1 []\n", done.stderr
        client = torc.Client(server.url, "alice", ALICE)
        assert [job["status"] for job in client.items("/jobs", workflow_id=1)] == ["ready", "blocked"]
        client.close()


def test_the_first_output_of_the_readme_is_real(shell):
    block = re.search(r"^```\n(.*?)^```", README, re.S | re.M)[1]
    commands = re.findall(r"^\$ (.*)$", block, re.M)
    done = subprocess.run(["bash", "-c", " && ".join(commands)], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=60)

    def words(text):                      # without figures; small jobs may be seen or not
        return sorted([word for word in line.split() if not re.search(r"\d|MB", word)]
                      for line in text.splitlines() if not line.startswith("$ "))

    assert words(done.stdout) == words(block)


def counted(package):
    """Functions, classes and lines of a package of the standard library, counted directly."""
    counts = {"functions": 0, "classes": 0, "lines": 0}
    for path in Path("lib", package).rglob("*.py"):
        text = path.read_bytes()
        counts["lines"] += text.count(b"\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                counts["functions"] += 1
            elif isinstance(node, ast.ClassDef):
                counts["classes"] += 1
    return counts


@pytest.mark.slow
def test_the_standard_library_is_counted_right_and_only_what_changed_runs_again(shell):
    import sysconfig
    packages = re.search(r"package: \[(.*?)\]", README, re.S)[1].replace(",", " ").split()
    for package in packages:
        shutil.copytree(Path(sysconfig.get_path("stdlib"), package), Path("lib", package),
                        ignore=shutil.ignore_patterns("__pycache__", "test*"))
    torc_run = ["torc", "run", "stdlib.yaml"]
    done = subprocess.run(torc_run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = {package: counted(package) for package in packages}
    assert json.loads(Path("total.json").read_text()) == expected
    touched = Path("lib/json/__init__.py")
    touched.write_text(touched.read_text() + "\ndef one_more():\n    pass\n")
    os.utime(touched, (1, 1))
    plan = subprocess.run(["torc", "workflows", "reinit", "1", "--dry-run"], capture_output=True,
                          text=True)
    assert "count_json" in plan.stdout and "merge" in plan.stdout and "count_xml" not in plan.stdout
    assert subprocess.run(["torc", "workflows", "reinit", "1"]).returncode == 0
    assert subprocess.run(["torc", "run", "1"]).returncode == 0
    client = torc.LocalClient("torc_output/torc.db")
    again = [item["job_id"] for item in client.items("/results", workflow_id=1, run_id=2,
                                                     all_runs=True)]
    names = {job["id"]: job["name"] for job in client.items("/jobs", workflow_id=1)}
    assert sorted(names[job_id] for job_id in again) == ["count_json", "merge"]
    expected["json"]["functions"] += 1
    expected["json"]["lines"] += 3
    assert json.loads(Path("total.json").read_text()) == expected
    client.close()


def test_every_command_is_in_the_readme():
    missing = [name for name in torc.COMMANDS
               if not all(re.search(rf"`[^`\n]*\b{re.escape(word)}\b[^`\n]*`", README)
                          for word in name.split())]
    assert missing == []


def test_the_readme_names_all_our_operations():
    missing = [path for _, path, *_ in torc.ROUTES
               if path.rpartition("/")[2] in ("server_info", "workflow_specs", "runner_step", "changes",
                                              "counts", "unfinished", "stop", "rerun", "why", "release",
                                              "summary", "graph", "timeline", "usage", "failures",
                                              "stream")
               and f"/{path.rpartition('/')[2]}" not in README]
    assert missing == []


def test_a_diamond_runs_where_there_is_only_the_interpreter(tmp_path):
    bare = [PYTHON, "-I", "-S", TORC]
    done = subprocess.run([*bare, "run", "--example", "diamond"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run([*bare, "results", "list"], cwd=tmp_path, capture_output=True, text=True)
    assert "Total: 4 results" in listed.stdout


@pytest.mark.slow
def test_a_bundle_runs_yaml_and_serves_where_there_is_only_the_interpreter(tmp_path):
    bundle = tmp_path / "torc.pyz"
    assert subprocess.run([*COMMAND, "bundle", str(bundle)], cwd=tmp_path).returncode == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "x.yaml").write_text("name: x\njobs:\n  - {name: a, command: 'echo 1:5'}\n")
    bare = [PYTHON, "-I", "-S", str(bundle)]
    done = subprocess.run([*bare, "run", str(tmp_path / "x.yaml")], cwd=empty, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    server = subprocess.Popen([*bare, "server", "--port", "0", "--database", "s.db"], cwd=empty,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        port = int(server.stdout.readline().split("=")[1])
        url = f"http://127.0.0.1:{port}{torc.API_PREFIX}"
        assert torc.Client(url).get("/ping") == {"status": "ok"}
        if sys.version_info[:2] in ((3, 11), (3, 12), (3, 13)):
            python = outside_python("torc.openapi_client")
            done = subprocess.run([python, "-c", TORC_CLIENT_DIAMOND, url], cwd=empty,
                                  capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
    finally:
        server.terminate(), server.communicate()


def test_the_root_holds_five_files_and_dot_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {name.split("/")[0] for name in listed.stdout.split()}
    assert {name for name in names if not name.startswith(".")} <= {
        "torc.py", "test_torc.py", "pyproject.toml", "README.md", "LICENSE"}


# ==================================================================================================
# Figures: pytest -m bench -s
# ==================================================================================================


def show(what, figure, floor, ratio=None):
    """One line of the table of figures."""
    print(f"\n  {what:<48} {figure:<28} floor: {floor:<26}"
          + (f" ratio {ratio:.2f}" if ratio is not None else ""))


def wall(*words, **options):
    """Seconds that a command takes; it must succeed."""
    started = time.perf_counter()
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.perf_counter() - started


def xargs_rate(number, slots):
    """No-ops a second of xargs with as many bash processes."""
    seconds = wall("bash", "-c", f"seq {number} | xargs -P{slots} -n1 bash -c true")
    return number / seconds


def peak_mb(pid):
    """Peak resident memory of a process so far, MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def run_seconds(directory, url, workflow_id):
    """Seconds from the first to the last moment of a workflow's results, by the run's own clock."""
    started = time.perf_counter()
    runner = start_run(directory, workflow_id, "--url", url, "--max-parallel-jobs", 2)
    assert runner.wait(600) == 0, (directory / "run.log").read_text()
    return time.perf_counter() - started


def bench_workflow(client, jobs):
    """Create and initialize a workflow from payload jobs; returns its id."""
    workflow_id = client.post("/workflow_specs", {"workflow": {"name": "b", "user": "tester"},
                                                  "jobs": jobs})["id"]
    client.put(f"/workflows/{workflow_id}/status", {"run_id": 1, "is_canceled": False})
    client.post(f"/workflows/{workflow_id}/initialize_jobs")
    return workflow_id


@pytest.mark.bench
def test_bench_2000_no_ops_over_http(server, tmp_path):
    client = server.client()
    rates, floors, startup = [], [], []
    for _ in range(3):
        floors.append(xargs_rate(1000, 2))
        empty = bench_workflow(client, [{"name": "j", "command": "true"}])
        startup.append(run_seconds(tmp_path, server.url, empty))
        workflow_id = bench_workflow(
            client, [{"name": f"j{number}", "command": "true"} for number in range(2000)])
        rates.append(2000 / run_seconds(tmp_path, server.url, workflow_id))
    rate, floor = max(rates), max(floors)
    show("2,000 no-ops, 2 slots, whole command", f"{rate:.0f} jobs/s",
         f"xargs {floor:.0f}/s", rate / floor)
    net = 2000 / (2000 / rate - min(startup))
    show("  the same without start-up", f"{net:.0f} jobs/s", f"xargs {floor:.0f}/s", net / floor)
    assert net / floor > 0.45             # the goal is 0.7; machines differ by a third


@pytest.mark.bench
def test_bench_exec_beside_parallel_and_xargs(tmp_path, monkeypatch):
    """2,000 `true`, 2 at a time, whole commands in turn; xargs starts a bash for each as torc does."""
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("true\n" * 2000)
    commands = {"torc exec": [*COMMAND, "exec", "-C", "list.txt", "-j", 2],
                "xargs -n1 bash -c": ["bash", "-c", "xargs -P2 -n1 bash -c < list.txt"],
                "xargs -n1 sh -c": ["bash", "-c", "xargs -P2 -n1 sh -c < list.txt"]}
    if shutil.which("parallel"):
        commands["parallel"] = ["bash", "-c", "parallel --will-cite -j2 < list.txt"]
    rates = {}
    for _ in range(3):
        shutil.rmtree("torc_output", ignore_errors=True)
        for name, words in commands.items():
            rates[name] = max(2000 / wall(*words), rates.get(name, 0))
    floor = rates["xargs -n1 bash -c"]
    for name, rate in rates.items():
        show(f"2,000 `true`, 2 at a time: {name}", f"{rate:.0f} jobs/s", f"xargs {floor:.0f}/s",
             rate / floor)
    assert rates["torc exec"] / floor > 0.45            # the goal is 0.8; machines differ by a third


@pytest.mark.bench
def test_bench_exec_starts_10000_commands(tmp_path):
    (tmp_path / "list.txt").write_text("true\n" * 10_000)
    times = []
    for number in range(3):
        directory = tmp_path / str(number)
        started = time.perf_counter()
        process = exec_process(tmp_path, "-C", "list.txt", "-o", directory, stderr=subprocess.DEVNULL)
        folder = directory / "job_stdio"
        while not (folder.exists() and os.listdir(folder)):
            time.sleep(0.001)
        times.append(time.perf_counter() - started)
        process.terminate(), process.communicate()
    floor = min(wall(*COMMAND, "--version") for _ in range(3))
    show("first of 10,000 commands from a file, goal 0.5 s", f"{min(times):.2f} s",
         f"torc --version {floor:.2f} s", min(times) / floor)
    assert min(times) / floor < 12


@pytest.mark.bench
def test_bench_chain_of_200_over_http(server, tmp_path):
    client = server.client()
    single = bench_workflow(client, [{"name": "j", "command": "true"}])
    startup = min(run_seconds(tmp_path, server.url, single) for _ in range(1))
    workflow_id = bench_workflow(client, [
        {"name": f"j{number}", "command": "true", "depends_on_job_ids": [number] if number else []}
        for number in range(201)])
    step = (run_seconds(tmp_path, server.url, workflow_id) - startup) / 200
    floor = 1 / xargs_rate(300, 1)
    show("chain of 200 `true`, a step", f"{1000 * step:.2f} ms", f"xargs -P1 {1000 * floor:.2f} ms",
         step / floor)
    assert step < 0.008


@pytest.mark.bench
@pytest.mark.slurm
def test_bench_two_allocations_share_2000_no_ops(cluster):
    site = Site(cluster, "share")
    floors = [xargs_rate(1000, 2)]
    jobs = {"gate": "sleep 5"}            # until both workers wait
    jobs.update((f"j{number}", {"command": "true", "depends_on": ["gate"]}) for number in range(2000))
    site.submit(allocation_spec(cluster, "share", jobs, scheduler={"ntasks_per_node": 1}, number=2))
    site.torc("wait", 1, timeout=180)
    floors.append(xargs_rate(1000, 2))
    with contextlib.closing(sqlite3.connect(cluster.directory / "hpcuser" / "share.db")) as database:
        [[days]] = database.execute("SELECT julianday(MAX(completion_time)) - "
                                    "julianday(MIN(completion_time)) FROM result")
        [[number, least]] = database.execute(
            "SELECT COUNT(*), MIN(jobs) FROM (SELECT COUNT(*) AS jobs FROM result "
            "WHERE return_code = 0 GROUP BY compute_node_id)")
    rate, floor = 2000 / (days * 86_400), max(floors)
    show("2,000 no-ops, two allocations of a slot", f"{rate:.0f} jobs/s", f"xargs {floor:.0f}/s",
         rate / floor)
    show("  jobs of the allocation with fewer", str(least), "a share of 1,000")
    assert number == 2 and least > 500
    assert rate / floor > 0.35            # the second worker, its Python and the server share 2 cores


def rounds_spec(path, width):
    """A spec of 4 rounds of `width` jobs with a barrier after each."""
    jobs = []
    for number in range(4):
        names = [f"job_{number}_{index}" for index in range(width)]
        needs = [f"barrier_{number - 1}"] if number else []
        jobs += [{"name": name, "command": "true", "depends_on": needs} for name in names]
        jobs.append({"name": f"barrier_{number}", "command": "true", "depends_on": names})
    path.write_text(json.dumps({"name": "rounds", "jobs": jobs}))
    return path


# Not ru_maxrss: that starts with the memory of the process that forks.
MEASURED = "import re, sys, torc; code = torc.main(sys.argv[1:]); " \
           "print('PEAK', int(re.search('VmHWM: *([0-9]+)', open('/proc/self/status').read().replace('\\t', ' '))[1])" \
           " // 1024); sys.exit(code)"


@pytest.mark.bench
def test_bench_100004_jobs(server, tmp_path):
    spec = rounds_spec(tmp_path / "rounds.json", 25_000)
    started = time.perf_counter()
    json.loads(spec.read_text())
    floor = time.perf_counter() - started
    started = time.perf_counter()
    done = subprocess.run([PYTHON, "-c", MEASURED, "create", str(spec), "--url", server.url],
                          cwd=ROOT, capture_output=True, text=True)
    created = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    client_mb = int(done.stdout.split("PEAK")[1])
    started = time.perf_counter()
    server.client().post("/workflows/1/initialize_jobs")
    initialized = time.perf_counter() - started
    server_mb = peak_mb(server.process.pid)
    assert server.client().get("/workflows/1/counts")["ready"] == 25_000
    show("create 100,004 jobs", f"{created:.2f} s", f"json.loads {floor:.2f} s")
    show("  peak memory, client / server", f"{client_mb} / {server_mb:.0f} MB", "goal 500 / 300 MB")
    show("initialize them", f"{initialized:.2f} s", "goal 3 s")
    assert created < 10 and initialized < 3 and client_mb < 500 and server_mb < 300


VIEWS = [                                 # what a page asks of a workflow, and how often as dear
    ("first page", "/jobs", {"limit": 50, "include_results": True}),
    ("last page", "/jobs", {"limit": 50, "offset": "LAST", "include_results": True}),
    ("filter by status", "/jobs", {"limit": 50, "status": "failed,running", "include_results": True}),
    ("filter by family", "/jobs", {"limit": 50, "family": "score", "include_results": True}),
    ("search", "/jobs", {"limit": 50, "search": "score_00", "include_results": True}),
    ("search, nothing found", "/jobs", {"limit": 50, "search": "zzz", "include_results": True}),
    ("longest first", "/jobs", {"limit": 50, "sort_by": "ran", "reverse_sort": True,
                                "include_results": True}),
    ("summary", "/workflows/W/summary", {}), ("graph", "/workflows/W/graph", {}),
    ("timeline", "/workflows/W/timeline", {"bins": 300}),
    ("usage", "/workflows/W/usage", {"bins": 240}), ("failures", "/workflows/W/failures", {}),
    ("list of workflows", "/workflows", {"include_counts": True}),
]


def half_done(database, size):
    """A workflow of about `size` jobs with a past: half of its two large families have ended."""
    store = torc.Store(str(database))
    api, width = torc.LocalClient(str(database), "tester", store), (size - 100) // 2
    graph = {"prepare": [], **{f"sim_{number:05d}": ["prepare"] for number in range(width)}}
    names = list(graph)
    jobs = [{"name": name, "command": f"python {name}.py --out {name}.h5",
             "depends_on_job_ids": [1] if number else []} for number, name in enumerate(names)]
    jobs += [{"name": f"score_{number:05d}", "command": f"python score.py {number}",
              "depends_on_job_ids": [2 + number]} for number in range(width)]
    jobs += [{"name": f"reduce_{number:02d}", "command": "python reduce.py",
              "depends_on_job_ids": list(range(2 + width + number, 2 + 2 * width, 96))}
             for number in range(96)]
    workflow_id = bench_workflow(api, jobs)
    now, ids = time.time(), [row[0] for row in store.query(
        "SELECT id FROM job WHERE workflow_id = ? ORDER BY id", (workflow_id,))]
    nodes = [make_node(api, workflow_id, hostname=f"c{number}", num_cpus=16,
                       start_time=torc.iso_time(now - 9000)) for number in range(6)]
    ended = [ids[0]] + [job_id for number in range(width // 2)
                        for job_id in (ids[1 + number], ids[1 + width + number])]
    with store.transaction():
        for place, job_id in enumerate(ended):
            bad = place % 300 == 299
            torc.store_result(store, {
                "workflow_id": workflow_id, "job_id": job_id, "run_id": 1, "attempt_id": 1,
                "compute_node_id": nodes[place % 6], "return_code": int(bad),
                "exec_time_minutes": 1 + place % 7 / 3, "peak_memory_bytes": 10**8 + place,
                "completion_time": torc.iso_time(now - 9000 + 9000 * place / len(ended)),
                "status": "failed" if bad else "completed",
                "stderr_tail": "Traceback\nValueError: no" if bad else None})
        for status in (torc.FAILED, torc.COMPLETED):
            torc.set_status(store, [row[0] for row in store.query(
                "SELECT job_id FROM result WHERE workflow_id = ? AND status = ?",
                (workflow_id, status))], status, None, code=1)
        torc.propagate(store, workflow_id)
    store.close()
    return workflow_id


@pytest.mark.bench
def test_bench_views_of_100000_jobs(tmp_path):
    ids = {size: half_done(tmp_path / "views.db", size) for size in (1000, 100_000)}
    with Server(tmp_path / "views.db").closing() as server:
        client = server.client()

        def seconds(path, query):
            times = []
            for _ in range(5):
                started = time.perf_counter()
                client.get(path, **query)
                times.append(time.perf_counter() - started)
            return times[0], min(times)

        ping, slow = seconds("/ping", {})[1], []
        for what, path, query in VIEWS:
            figures = {}
            for size, workflow_id in ids.items():
                asked = {name: size - 150 if value == "LAST" else value
                         for name, value in query.items()}
                if path == "/jobs":
                    asked["workflow_id"] = workflow_id
                figures[size] = seconds(path.replace("W", str(workflow_id)), asked)
            first, best = figures[100_000]
            show(f"100,000 jobs: {what}", f"{1000 * best:.0f} ms (first {1000 * first:.0f})",
                 f"1,000 jobs: {1000 * figures[1000][1]:.1f} ms", best / figures[1000][1])
            slow += [what] if best > 200 * ping else []
        show("  ping", f"{1000 * ping:.2f} ms", "")
        assert slow == []


@pytest.mark.bench
def test_bench_cost_per_job_does_not_grow_with_the_workflow(server):
    client, figures = server.client(), {}
    for size in (1000, 100_000):
        workflow_id = bench_workflow(client, [{"name": f"j{number}", "command": "true"}
                                              for number in range(size)])
        runner = Conversation(client, workflow_id)
        jobs, done, started = runner.step(limit=2)["jobs"], 0, time.perf_counter()
        while done < 900:
            done += len(jobs)
            jobs = runner.step([runner.done(job) for job in jobs], limit=2)["jobs"]
        figures[size] = done / (time.perf_counter() - started)
    ratio = figures[100_000] / figures[1000]
    show("runner_step, jobs/s of 100,000", f"{figures[100_000]:.0f}/s",
         f"of 1,000: {figures[1000]:.0f}/s", ratio)
    assert ratio > 0.5


def upstream_worker(url, workflow_id, node, results):
    """Claim, start and complete one job at a time until none is left."""
    client, number = torc.Client(url, "tester"), 0
    while True:
        jobs = client.post(f"/workflows/{workflow_id}/claim_next_jobs", limit=1)["jobs"]
        if not jobs:
            break
        client.put(f"/jobs/{jobs[0]['id']}/start_job/1/{node}")
        complete(client, jobs[0]["id"], workflow_id, node)
        number += 1
    results.append(number)


def ping_worker(url, results):
    """500 pings."""
    client = torc.Client(url, "tester")
    for _ in range(500):
        client.get("/ping")
    results.append(500)


WORKER = """
import sys, time, test_torc
results = []
kind, url = sys.argv[1:3]
sys.stdin.readline()
if kind == "ping":
    test_torc.ping_worker(url, results)
else:
    test_torc.upstream_worker(url, int(sys.argv[3]), int(sys.argv[4]), results)
print(results[0])
"""


def rate_of(clients, *words):
    """Operations a second of so many client processes, started together."""
    workers = [subprocess.Popen([PYTHON, "-c", WORKER, *map(str, words)], cwd=ROOT, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
               for _ in range(clients)]
    time.sleep(1.5 + 0.3 * clients)       # imports are not to be measured
    started = time.perf_counter()
    for worker in workers:
        worker.stdin.write("go\n"), worker.stdin.flush()
    total = sum(int(worker.stdout.readline()) for worker in workers)
    seconds = time.perf_counter() - started
    [worker.communicate() for worker in workers]
    return total / seconds


@pytest.mark.bench
@pytest.mark.parametrize("clients", [1, 8])
def test_bench_upstreams_endpoints(server, clients):
    client = server.client()
    workflow_id = bench_workflow(client, [{"name": f"j{number}", "command": "true"}
                                          for number in range(600 * min(clients, 3))])
    node = make_node(client, workflow_id)
    floor = rate_of(clients, "ping", server.url)
    rate = rate_of(clients, "jobs", server.url, workflow_id, node)
    show(f"claim, start, complete; {clients} clients", f"{rate:.0f} jobs/s", f"ping {floor:.0f}/s",
         rate / floor)
    assert rate / floor > 0.15


@pytest.mark.bench
def test_bench_start_up(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "cache"))
    best = lambda *words: min(wall(*words, cwd=tmp_path) for _ in range(7))  # noqa: E731
    floor = best(PYTHON, "-c", "pass")
    make(torc.LocalClient(str(tmp_path / "x.db")), {"a": []})
    cached = [PYTHON, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torc; "
                            "sys.exit(torc.main(sys.argv[1:]))"]
    for name, words in (("--version", ["--version"]),
                        ("jobs list", ["jobs", "list", "1", "--database", "x.db"])):
        for how, start, goal in (("cached bytecode", cached, 0.060), ("python torc.py",
                                                                     [PYTHON, TORC], 0.150)):
            extra = best(*start, *words) - floor
            show(f"torc {name}, {how}, over the floor", f"{1000 * extra:.0f} ms",
                 f"python -c pass {1000 * floor:.0f} ms")
            assert extra < 2.5 * goal


@pytest.mark.bench
def test_bench_idle_server(server):
    server.client().get("/ping")
    stat = Path(f"/proc/{server.process.pid}/stat")
    ticks = lambda: sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))  # noqa: E731
    before, started = ticks(), time.monotonic()
    time.sleep(30)                        # idleness cannot be waited for otherwise
    an_hour = (ticks() - before) / os.sysconf("SC_CLK_TCK") * 3600 / (time.monotonic() - started)
    memory = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())[1])
    show("idle server: CPU an hour, memory", f"{an_hour:.1f} s, {memory / 1024:.0f} MB",
         "goal 2 s, 60 MB")
    assert memory < 60 * 1024 and an_hour < 10


FLOOD = """
import asyncio, base64, sys, time
port, user, rate = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
answered = [0, 0]

async def guess(number):
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        word = base64.b64encode(f"{user}:guess {number}".encode()).decode()
        writer.write(f"GET /torc-service/v1/ping HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n"
                     f"Authorization: Basic {word}\\r\\n\\r\\n".encode())
        await reader.read()
        writer.close()
    except OSError:
        pass

async def flood():
    started, number, tasks = time.monotonic(), 0, set()
    while True:
        number += 1
        task = asyncio.ensure_future(guess(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await asyncio.sleep(max(0, started + number / rate - time.monotonic()))

asyncio.run(flood())
"""


def answer_seconds(server, user, password, number=1):
    """Sorted seconds of so many first-to-last requests of one client."""
    client = torc.Client(server.url, user, password)
    times = []
    for _ in range(number):
        started = time.perf_counter()
        client.get("/ping")
        times.append(time.perf_counter() - started)
    client.close()
    return sorted(times)


@pytest.mark.bench
def test_bench_the_end_of_1000_jobs_of_three_processes(tmp_path):
    runner = run_spec(tmp_path, {f"j{number}": "sleep 300 & sleep 301 & wait" for number in range(1000)},
                      parallel=1000)
    until(lambda: len(processes_in(tmp_path)) >= 3001, 120)
    started = time.perf_counter()
    runner.terminate()
    assert runner.wait(60) == 143
    elapsed = time.perf_counter() - started
    until(lambda: not processes_in(tmp_path), what="the end of all processes")
    show("the end of 1,000 jobs of three processes", f"{elapsed:.2f} s", "goal 3 s")
    assert elapsed < 3


@pytest.mark.bench
@pytest.mark.parametrize("cost", [5, 10, 12])
def test_bench_200_wrong_passwords_a_second(tmp_path, cost):
    file = torc.PasswordFile(str(tmp_path / "users"), absent=True)
    for user, password in (("alice", ALICE), ("bob", BOB)):
        file.set(user, torc.hash_password(password, cost))
    file.write()
    cached = {}
    for flooded in (False, True):
        server = Server(tmp_path / f"{flooded}.db", 0, "--auth-file", file.path, "--require-auth")
        flood = None
        if flooded:
            flood = subprocess.Popen([PYTHON, "-c", FLOOD, str(server.port), "alice", "200"])
            time.sleep(2)                 # so that guesses stand in line
        fresh = {"bob": answer_seconds(server, "bob", BOB)[-1]}
        started = time.perf_counter()
        with contextlib.suppress(torc.TorcError):    # in the lane of the guesses: it may be unlucky
            answer_seconds(server, "alice", ALICE)
        fresh["alice (the guesses' own address and name)"] = time.perf_counter() - started
        times = answer_seconds(server, "bob", BOB, 200)
        cached[flooded] = times[100]
        what = "200 guesses/s for alice" if flooded else "no guesses"
        show(f"bcrypt cost {cost}, {what}: cached", f"{1000 * times[100]:.1f} ms", "goal 50 ms")
        for user, seconds in fresh.items():
            show(f"  not cached: {user}", f"{seconds:.2f} s", "goal 2 s")
        if flood:
            flood.kill(), flood.wait()
        server.stop()
        assert cached[flooded] < 0.05 and fresh["bob"] < 2
        assert cost > 10 or max(fresh.values()) < 2, fresh
