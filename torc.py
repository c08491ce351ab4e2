#!/usr/bin/env python3
"""torc: a workflow manager for HPC clusters in one file.

REST server on SQLite, client, command line and job runner. It speaks the REST API of Torc 0.22
(/torc-service/v1), so clients made for Torc work against it. Python 3.9 or newer; the server also
needs bottle and waitress, YAML specifications need PyYAML.

    python torc.py run --example hello        run something now, nothing to configure
    python torc.py run spec.yaml              run a workflow on this machine
    python torc.py server --help              serve several machines or users

Map of this file. Code uses only what stands above it.
  1 Head                     constants of the protocol, defaults
  2 Errors and values        error classes; durations, sizes and times to and from text
  3 Records                  job statuses and KINDS, one row for each kind of record
  4 Workflow specification   a spec file to plain records: parse, expand, check
  5 Store                    schema, migrations, transactions, the generic six operations
  6 Engine                   what changes job and workflow state
  7 Access                   password files, credentials of requests, groups
  8 API                      every operation as a function of a Request; ROUTES
  9 Client                   over HTTP or on a database file: the same methods and errors
  10 Runner                  child processes, resources, time limits, journal, guardian
  11 Slurm                   allocations and their workers, HPC profiles
  12 Server                  bottle and waitress; sockets, logging, shutdown
  14 Command line            commands with their options, tables and JSON, main
"""
from __future__ import annotations

# ==================================================================================================
# 1 Head
# ==================================================================================================
# Standard library only, and only what every command needs: --version must stay quick. Modules that
# one part alone needs (http.client, sqlite3, subprocess) are imported by the functions there.
import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from typing import Any, NamedTuple

VERSION = "0.1.0"
SPOKEN_VERSION = "0.22.1"                 # the release of Torc whose clients we serve
API_VERSION = "0.12.0"                    # clients refuse another major, warn at another minor
API_PREFIX = "/torc-service/v1"
DEFAULT_PORT = 8080
DEFAULT_URL = f"http://localhost:{DEFAULT_PORT}{API_PREFIX}"
DEFAULT_OUTPUT_DIR = "torc_output"
LOCAL_DATABASE = "torc.db"                # below the output directory, when no server is named
MAX_LIMIT = 100_000                       # records a list answers at most, and the default
MAX_BODY_BYTES = 64 * 2**20
STDERR_TAIL_BYTES = 4096                  # of a failed job, travels with its completion
ORPHAN_RETURN_CODE = -128                 # result of an attempt whose runner died
LEASE_MARGIN_S = 60.0
BUSY = "too many passwords wait to be checked"
EXTENSIONS = ("runner_step", "changes", "server_info", "workflow_specs", "unfinished",
              "why", "stop_job", "release", "summary", "graph", "failures", "include_results",
              "include_counts", "search", "family", "timeline", "usage", "events_stream")


def own_hash():
    """First 12 hex digits of the SHA-256 of this program's text: people copy this file."""
    try:
        with open(__file__, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:12]
    except OSError:                       # inside a zip archive
        loader = globals().get("__loader__")
        text = loader.get_data(__file__) if hasattr(loader, "get_data") else VERSION.encode()
        return hashlib.sha256(text).hexdigest()[:12]


# ==================================================================================================
# 2 Errors and values
# ==================================================================================================
# Nothing here has state. An error is raised anywhere and shown once: by the server as a status and
# a body, by the command line as one line. str(error) is the whole message.


class TorcError(Exception):
    """A failure the user is meant to read: str(error) is the whole message."""

    status = 500
    exit_code = 1
    title = "InternalServerError"         # the word that clients see beside the message
    plain = False                         # True: the body is plain text, not JSON


class BadRequest(TorcError):
    """A path value or query parameter cannot be read, or a body is not JSON."""

    status, title, plain = 400, "BadRequest", True


class Unauthorized(TorcError):
    """Credentials are needed, or those given are wrong."""

    status, title, plain = 401, "Unauthorized", True


class Forbidden(TorcError):
    """The caller may not do this."""

    status, title = 403, "Forbidden"


class NotFound(TorcError):
    """The record named does not exist, or the caller may not know that it does."""

    status, title = 404, "NotFound"


class Conflict(TorcError):
    """Somebody else was first."""

    status, title = 409, "Conflict"


class TooLarge(TorcError):
    """The request body is larger than the server takes."""

    status, title, plain = 413, "PayloadTooLarge", True


class UnsupportedMedia(TorcError):
    """A JSON body came without Content-Type: application/json."""

    status, title, plain = 415, "UnsupportedMediaType", True


class Invalid(TorcError):
    """The request can be read, but its values make no sense in this state."""

    status, title = 422, "UnprocessableEntity"


class BadShape(Invalid):
    """A JSON body lacks a required field or has one of the wrong type."""

    plain = True


class Internal(TorcError):
    """A constraint of the store is violated, or a state forbids the change (upstream: 500)."""


class Unreachable(TorcError):
    """No server answered, or the database file cannot be used."""

    status, title = 503, "Unreachable"


class UsageError(TorcError):
    """The command line makes no sense."""

    exit_code = 2
    title = "UsageError"


class MissingPackage(TorcError):
    """A feature needs a package that is not installed."""

    def __init__(self, package, purpose):
        super().__init__(f"{purpose} needs the package {package}, which is not installed: "
                         f"python3 -m pip install --user {package}")


class SpecError(TorcError):
    """A workflow specification has errors; `errors` lists them all, one sentence each."""

    status = 422

    def __init__(self, errors):
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


ERROR_OF_STATUS = {kind.status: kind for kind in (
    BadRequest, Unauthorized, Forbidden, NotFound, Conflict, TooLarge, UnsupportedMedia, Invalid,
    Internal, Unreachable)}

MEMORY_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
DURATION_UNITS = {"Y": 31_557_600, "M": 2_629_800, "W": 604_800, "D": 86_400}
TIME_UNITS = {"H": 3600, "M": 60, "S": 1}


def parse_memory(text):
    """Bytes of a memory size: an integer and at most one letter k, m, g, t (1024 steps).

    A bare number is bytes. Raises ValueError. "1.5g", "1gb" and negative sizes are refused.
    """
    match = re.fullmatch(r"\s*(\d+)([kmgtKMGT]?)\s*", text) if isinstance(text, str) else None
    size = int(match[1]) * MEMORY_UNITS[match[2].lower()] if match else -1
    if not 0 <= size < 2**63:
        raise ValueError(f"memory {text!r} is not a whole number with at most one of k, m, g, t "
                         'behind it, as in "500m" or "2g"')
    return size


def parse_duration(text):
    """Whole seconds of an ISO 8601 duration such as PT30M, P1DT2H, P2W, P0003-01-02T01:02:03.

    A year counts 365.25 days, a month a twelfth of that; fractions of a second are cut off.
    Raises ValueError.
    """
    seconds = None
    if isinstance(text, str):
        full = re.fullmatch(r"P(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)", text)
        parts = re.fullmatch(r"P((?:\d+[YMWD])*)(?:T((?:\d+(?:\.\d+)?[HMS])+))?", text)
        if full:
            units = (31_557_600, 2_629_800, 86_400, 3600, 60, 1)
            seconds = sum(int(number) * unit for number, unit in zip(full.groups(), units))
        elif parts and (parts[1] or parts[2]):
            seconds = sum(int(number) * DURATION_UNITS[unit]
                          for number, unit in re.findall(r"(\d+)([YMWD])", parts[1] or ""))
            seconds += sum(float(number) * TIME_UNITS[unit] for number, unit in
                           re.findall(r"(\d+(?:\.\d+)?)([HMS])", parts[2] or ""))
    if seconds is None or seconds >= 2**53:
        raise ValueError(f"duration {text!r} is not ISO 8601, as in PT30M (30 minutes), PT2H or "
                         "P1DT12H")
    return int(seconds)


def format_duration(seconds):
    """A duration for people: 0.4s, 12s, 3m20s, 2h05m, 3d04h."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def format_bytes(size):
    """A size for people: 512 B, 1.5 MB, 2.0 GB (1024 steps)."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def plural(number, noun):
    """1 job, 2 jobs; nouns that end in data or requirements have no plural."""
    if number == 1 or noun.endswith(("data", "requirements")):
        return f"{number} {noun}"
    return f"{number} {noun[:-1] + 'ies' if noun.endswith('y') else noun + 's'}"


def iso_time(seconds):
    """UTC with milliseconds of seconds since the epoch: 2026-01-02T03:04:05.678Z."""
    whole, millis = divmod(int(seconds * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{millis:03d}Z"


def local_time(value):
    """Seconds since the epoch (or milliseconds, or a text) as local time."""
    if isinstance(value, str):
        return value
    seconds = value / 1000 if value > 1e11 else value
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def nearest(word, known):
    """The name in `known` most like `word`, as ' (did you mean "x"?)', or ''."""
    import difflib
    names = [str(name) for name in known]
    if len(names) > 20_000:               # difflib compares with every name
        names = [name for name in names if name[:2] == str(word)[:2]][:20_000]
    close = difflib.get_close_matches(str(word), names, 1, 0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""


ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


def compact(value):
    """JSON text without blanks."""
    return ENCODER.encode(value)          # json.dumps would make an encoder each time


def read_text(path):
    """A small file's text without the last newline, or "" if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


# ==================================================================================================
# 3 Records
# ==================================================================================================
# What the program keeps, as tables: the statuses of a job, and a row of KINDS for every kind of
# record. Store, API and command line are written against these rows.

(UNINITIALIZED, BLOCKED, READY, PENDING, RUNNING, COMPLETED, FAILED, CANCELED, TERMINATED, DISABLED,
 PENDING_FAILED) = range(11)              # as stored, and the order in which status sorts
STATUS_NAMES = ("uninitialized", "blocked", "ready", "pending", "running", "completed", "failed",
                "canceled", "terminated", "disabled", "pending_failed")
STATUS_OF_NAME = {name: number for number, name in enumerate(STATUS_NAMES)}
COMPLETE_SET = (COMPLETED, FAILED, CANCELED, TERMINATED)      # these satisfy a dependency
UNSUCCESSFUL = (FAILED, CANCELED, TERMINATED)
FINAL_SET = (*COMPLETE_SET, PENDING_FAILED)                   # what complete_job may set


class Field(NamedTuple):
    """One field of a record: its JSON type and whether a client must send it."""

    name: str
    type: str                             # int, float, str, bool, any, status, ints, or echo:
                                          # a text that is answered but not kept
    required: bool = False
    server: bool = False                  # set by the server, whatever a client sends


def fields(text):
    """Fields from words like "name:str! size:int id:int*": ! is required, * the server's own."""
    parsed = []
    for word in text.split():
        name, kind = word.split(":")
        parsed.append(Field(name, kind.strip("!*"), kind.endswith("!"), kind.endswith("*")))
    return tuple(parsed)


class Kind(NamedTuple):
    """One kind of record: its table, its URL, its fields and what a list can be filtered by."""

    name: str                             # in messages: "No file with id 7"
    table: str
    path: str
    fields: tuple
    filters: str = ""                     # fields compared exactly; others are the list's own
    unsorted: str = ""                    # fields a list cannot be sorted by
    ops: str = "create list clear get update delete"

    def field(self, name):
        """The field called `name`."""
        return next(field for field in self.fields if field.name == name)


KINDS = {kind.table: kind for kind in (
    Kind("workflow", "workflow", "/workflows", fields(
        "id:int* name:str! user:str! description:str timestamp:str* project:str metadata:str"
        " compute_node_expiration_buffer_seconds:int compute_node_wait_for_new_jobs_seconds:int"
        " compute_node_ignore_workflow_completion:bool"
        " compute_node_wait_for_healthy_database_minutes:int"
        " compute_node_min_time_for_new_jobs_seconds:int resource_monitor_config:str"
        " slurm_defaults:str slurm_config:str execution_config:str use_pending_failed:bool"
        " enable_ro_crate:bool status_id:int*"),
        filters="name user", unsorted="slurm_config execution_config", ops="get delete"),
    Kind("job", "job", "/jobs", fields(
        "id:int* workflow_id:int! name:str! command:str! invocation_script:str status:status"
        " cancel_on_blocking_job_failure:bool supports_termination:bool"
        " resource_requirements_id:int scheduler_id:int failure_handler_id:int attempt_id:int*"
        " priority:int stdio:str depends_on_job_ids:ints input_file_ids:ints output_file_ids:ints"
        " input_user_data_ids:ints output_user_data_ids:ints"),
        unsorted="priority stdio", ops="clear delete"),
    Kind("file", "file", "/files", fields(
        "id:int* workflow_id:int! name:str! path:str! st_mtime:float"), filters="name path",
        ops="create clear get delete"),
    Kind("user data", "user_data", "/user_data", fields(
        "id:int* workflow_id:int! name:str! is_ephemeral:bool data:any"),
        filters="is_ephemeral", ops="clear get update delete"),
    Kind("resource requirements", "resource_requirements", "/resource_requirements", fields(
        "id:int* workflow_id:int! name:str! num_cpus:int num_gpus:int num_nodes:int memory:str"
        " runtime:str"),
        filters="name memory num_cpus num_gpus num_nodes", ops="clear get delete"),
    Kind("failure handler", "failure_handler", "/failure_handlers", fields(
        "id:int* workflow_id:int! name:str! rules:str!"), ops="create get delete"),
    Kind("Slurm scheduler", "slurm_scheduler", "/slurm_schedulers", fields(
        "id:int* workflow_id:int! name:str account:str! gres:str mem:str nodes:int!"
        " ntasks_per_node:int partition:str qos:str tmp:str walltime:str! extra:str")),
    Kind("compute node", "compute_node", "/compute_nodes", fields(
        "id:int* workflow_id:int! hostname:str! pid:int! start_time:str! duration_seconds:float"
        " is_active:bool num_cpus:int! memory_gb:float! num_gpus:int! num_nodes:int!"
        " time_limit:str scheduler_config_id:int compute_node_type:str! scheduler:any"
        " boot_id:str pid_started:int output_dir:str"),
        filters="hostname is_active", unsorted="scheduler", ops="list clear get delete"),
    Kind("local scheduler", "local_scheduler", "/local_schedulers", fields(
        "id:int* workflow_id:int! name:echo memory:str num_cpus:int")),
    Kind("Slurm statistics", "slurm_stats", "/slurm_stats", fields(
        "id:int* workflow_id:int! job_id:int! run_id:int! attempt_id:int! slurm_job_id:str"
        " max_rss_bytes:int max_vm_size_bytes:int max_disk_read_bytes:int"
        " max_disk_write_bytes:int ave_cpu_seconds:float node_list:str"),
        filters="job_id run_id attempt_id", ops="create"),
    Kind("scheduled compute node", "scheduled_compute_node", "/scheduled_compute_nodes", fields(
        "id:int* workflow_id:int! scheduler_id:int! scheduler_config_id:int! scheduler_type:str!"
        " status:str! output_dir:str work_dir:str note:str"), filters="status",
        ops="list clear get update delete"),
    Kind("result", "result", "/results", fields(
        "id:int* workflow_id:int! job_id:int! run_id:int! attempt_id:int compute_node_id:int!"
        " return_code:int! exec_time_minutes:float! completion_time:str! status:status!"
        " peak_memory_bytes:int avg_memory_bytes:int peak_cpu_percent:float avg_cpu_percent:float"
        " stderr_tail:str"),
        filters="job_id run_id return_code status compute_node_id", ops="clear get update delete"),
    Kind("event", "event", "/events", fields(
        "id:int* workflow_id:int! timestamp:int data:any"), ops="clear get delete"),
)}
RELATIONS = {                             # a job's list of ids: its table, this column, theirs
    "depends_on_job_ids": ("job_dependency", "job_id", "depends_on_job_id"),
    "input_file_ids": ("job_input_file", "job_id", "file_id"),
    "output_file_ids": ("job_output_file", "job_id", "file_id"),
    "input_user_data_ids": ("job_input_user_data", "job_id", "user_data_id"),
    "output_user_data_ids": ("job_output_user_data", "job_id", "user_data_id"),
}
TRIGGERS = ("on_workflow_start", "on_workflow_complete", "on_jobs_ready", "on_jobs_complete",
            "on_worker_start", "on_worker_complete")
STDIO_MODES = ("separate", "combined", "no_stdout", "no_stderr", "none")


def stdio_name(workflow_id, job_id, run_id, attempt_id, ending):
    """Name of a job's output file below the output directory; ending: o, e or log."""
    return os.path.join("job_stdio",
                        f"job_wf{workflow_id}_j{job_id}_r{run_id}_a{attempt_id}.{ending}")


# ==================================================================================================
# 4 Workflow specification
# ==================================================================================================
# From a file to the plain records that POST /workflow_specs takes: parse, check each record,
# expand parameters, resolve names, check the whole. All errors are gathered and told together,
# with the line where one is known.

MOST_ERRORS = 100
MOST_JOBS = 1_000_000
PLACEHOLDER = re.compile(r"(\$?)\{([A-Za-z_]\w*)(?::([^{}]*))?\}")
VARIABLE = re.compile(r"\$\{(files|user_data)\.(input|output)\.([^}]*)\}")
NEARLY_VARIABLE = re.compile(r"\$\{(?:files?|user_?data)\b[^}\s]*\}?")
MODES = "direct|slurm|auto"

# Field: type, with ! when required. Types are explained by EXPECTED.
PARAMETERIZED = {"parameters": "map", "parameter_mode": "enum:product|zip",
                 "use_parameters": "strs"}
SPEC_FIELDS = {
    "workflow": {
        "name": "name!", "user": "str", "description": "str", "project": "str", "metadata": "json",
        "parameters": "map", "jobs": "list!", "files": "list", "user_data": "list",
        "resource_requirements": "list", "failure_handlers": "list", "slurm_schedulers": "list",
        "actions": "list", "slurm_defaults": "map", "resource_monitor": "map",
        "execution_config": "map", "use_pending_failed": "bool", "enable_ro_crate": "bool",
        "compute_node_wait_for_new_jobs_seconds": "count",
        "compute_node_ignore_workflow_completion": "bool",
        "compute_node_wait_for_healthy_database_minutes": "count",
        "compute_node_min_time_for_new_jobs_seconds": "count",
        "compute_node_expiration_buffer_seconds": "count"},
    "job": {
        "name": "name!", "command": "name!", "invocation_script": "str", "depends_on": "strs",
        "depends_on_regexes": "strs", "input_files": "strs", "input_file_regexes": "strs",
        "output_files": "strs", "output_file_regexes": "strs", "input_user_data": "strs",
        "input_user_data_regexes": "strs", "output_user_data": "strs",
        "output_user_data_regexes": "strs", "resource_requirements": "str", "scheduler": "str",
        "failure_handler": "str", "cancel_on_blocking_job_failure": "bool", "priority": "count",
        "stdio": "map", "supports_termination": "bool", **PARAMETERIZED},
    "file": {"name": "name!", "path": "name!", "st_mtime": "number", **PARAMETERIZED},
    "user data": {"name": "name!", "data": "any", "is_ephemeral": "bool"},
    "resource requirements": {"name": "name!", "num_cpus": "positive!", "memory": "memory!",
                              "num_gpus": "count", "num_nodes": "positive", "runtime": "duration"},
    "failure handler": {"name": "name!", "rules": "list!"},
    "rule": {"exit_codes": "ints", "match_all_exit_codes": "bool", "recovery_script": "str",
             "max_retries": "count"},
    "Slurm scheduler": {"name": "name!", "account": "name!", "partition": "str",
                        "nodes": "positive", "walltime": "walltime", "mem": "slurm memory",
                        "gres": "str", "qos": "str",
                        "tmp": "str", "ntasks_per_node": "positive", "extra": "str"},
    "action": {"trigger_type": "enum!:" + "|".join(TRIGGERS),
               "action_type": "enum!:run_commands|schedule_nodes", "jobs": "strs",
               "job_name_regexes": "strs", "commands": "strs", "scheduler": "str",
               "scheduler_type": "enum:slurm", "num_allocations": "positive",
               "start_one_worker_per_node": "bool", "max_parallel_jobs": "positive",
               "persistent": "bool"},
    "resource_monitor": {"enabled": "bool", "granularity": "enum:summary|time_series",
                         "sample_interval_seconds": "positive", "generate_plots": "bool"},
    "execution_config": {
        "mode": "enum:" + MODES, "sigkill_headroom_seconds": "count", "timeout_exit_code": "byte",
        "staggered_start": "bool", "limit_resources": "bool", "termination_signal": "signal",
        "sigterm_lead_seconds": "count", "oom_exit_code": "byte", "srun_termination_signal": "str",
        "enable_cpu_bind": "bool", "stdio": "map"},
    "stdio": {"mode": "enum:" + "|".join(STDIO_MODES), "delete_on_success": "bool"},
}
EXPECTED = {
    "name": "a text with something in it", "str": "a text", "int": "a whole number",
    "count": "a whole number of at least 0", "positive": "a whole number of at least 1",
    "byte": "an exit code from 1 to 255", "number": "a number", "bool": "true or false",
    "list": "a list", "map": "a mapping",
    "strs": "a list of texts", "ints": "a list of whole numbers",
    "json": "a mapping or a text of JSON", "any": "a value",
    "memory": 'a size such as "500m" or "2g"', "duration": 'an ISO 8601 duration such as "PT30M"',
    "walltime": 'a time such as "04:00:00" or "1-12:00:00"',
    "slurm memory": 'a size such as "200g" (MB without a letter)',
    "signal": 'the name of a signal such as "SIGTERM"',
}
DIRECT_ONLY = ("limit_resources", "termination_signal", "sigterm_lead_seconds", "oom_exit_code")
SLURM_ONLY = ("srun_termination_signal", "enable_cpu_bind")
NOT_IN_DEFAULTS = ("partition", "nodes", "walltime", "time", "mem", "gres", "name", "job-name")
LISTS = {"jobs": "job", "files": "file", "user_data": "user data",
         "resource_requirements": "resource requirements", "failure_handlers": "failure handler",
         "slurm_schedulers": "Slurm scheduler"}
JOB_LISTS = {                             # a job's list: what it names, and its list of regexes
    "depends_on": ("jobs", "depends_on_regexes"), "input_files": ("files", "input_file_regexes"),
    "output_files": ("files", "output_file_regexes"),
    "input_user_data": ("user_data", "input_user_data_regexes"),
    "output_user_data": ("user_data", "output_user_data_regexes")}
JOB_NAMES = {"resource_requirements": "resource_requirements", "scheduler": "slurm_schedulers",
             "failure_handler": "failure_handlers"}


class Spec(NamedTuple):
    """A checked specification: what to create, what it amounts to, and what seems odd."""

    payload: dict                         # body of POST /workflow_specs
    summary: dict
    warnings: list


def parse_walltime(text):
    """Seconds of a Slurm time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S (sbatch(1)).

    Raises ValueError.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text) \
        if isinstance(text, str) else None
    if not match:
        raise ValueError(f"{text!r} is not {EXPECTED['walltime']}")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        parts += [0] * (3 - len(parts))
    elif len(parts) < 3:                  # minutes, or minutes:seconds
        parts = [0, *parts, 0][:3] if len(parts) == 1 else [0, *parts]
    return int(days or 0) * 86_400 + parts[0] * 3600 + parts[1] * 60 + parts[2]


def slurm_memory(text):
    """Bytes of a Slurm memory size; a bare number is MB. Raises ValueError."""
    text = str(text)
    return parse_memory(text + "m" if text.isdigit() else text.rstrip("bB"))


# ---- reading

class Lines:
    """Finds the line of a record or field; parses the text once more, and only if asked."""

    def __init__(self, text, as_json):
        self.text, self.as_json = text, as_json
        self._root = None

    def of(self, path):
        """Line of the value at a path such as ("jobs", 3, "command"), or of what contains it."""
        try:
            return self._json(path) if self.as_json else self._yaml(path)
        except Exception:                 # no line is better than no message
            return None

    def _yaml(self, path):
        import yaml
        if self._root is None:
            self._root = yaml.compose(self.text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        node, line = self._root, None
        for step in path:
            if isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == step), None)
            else:
                pair = (node.value[step],) * 2 if isinstance(step, int) else None
            if not pair:
                break
            node, line = pair[1], pair[0].start_mark.line + 1
        return line

    def _json(self, path):
        if self._root is None:
            self._spots = SpotDecoder()
            self._root = self._spots.decode(self.text)
        value, spot = self._root, None
        for step in path:
            inner = value.get(step) if isinstance(value, dict) else value[step]
            if isinstance(inner, dict):
                spot = self._spots.start[id(inner)] - 1
            elif isinstance(value, dict) and step in value:
                found = re.compile(rf"{re.escape(json.dumps(step))}\s*:").search(
                    self.text, spot or 0)
                spot = found.start() if found else spot
            if inner is None:
                break
            value = inner
        return None if spot is None else self.text.count("\n", 0, spot) + 1


class SpotDecoder(json.JSONDecoder):
    """A JSON decoder that notes where each object begins, by id of the dict."""

    def __init__(self):
        import json.decoder
        import json.scanner
        super().__init__()
        self.start, self.keep = {}, []

        def parse_object(state, *rest):
            value, end = json.decoder.JSONObject(state, *rest)
            self.start[id(value)] = state[1]
            self.keep.append(value)       # so that no id is used twice
            return value, end

        self.parse_object = parse_object
        self.scan_once = json.scanner.py_make_scanner(self)


class Problems:
    """The errors found so far, each with the path of what it is about."""

    def __init__(self, name, lines=None):
        self.name, self.lines, self.found = name, lines, []

    def add(self, path, text):
        """Note an error."""
        self.found.append((path, text))

    def raise_any(self):
        """Raise SpecError if there are errors."""
        if not self.found:
            return
        sentences = []
        for path, text in self.found[:MOST_ERRORS]:
            line = self.lines.of(path) if self.lines and path else None
            sentences.append(f"{self.name}{f' line {line}' if line else ''}: {text}")
        if len(self.found) > MOST_ERRORS:
            sentences.append(f"{self.name}: and {len(self.found) - MOST_ERRORS} more errors")
        raise SpecError(sentences)


def read_spec_text(path):
    """The text of a specification file. Raises SpecError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise SpecError([f"{path}: not UTF-8 text (byte {error.start})"]) from None
    except OSError as error:
        raise SpecError([f"{path}: {error.strerror}"]) from None


def parse_spec_text(path, text):
    """(value, Lines) of a specification's text. Raises SpecError, MissingPackage."""
    ending = os.path.splitext(path)[1].lower()
    if ending in (".json5", ".kdl"):
        raise SpecError([f"{path}: {ending[1:].upper()} is not supported yet: convert it to "
                         "YAML or JSON"])
    if not text.strip():
        raise SpecError([f"{path}: the file is empty"])
    if ending == ".json" or (ending not in (".yaml", ".yml") and text.lstrip()[0] == "{"):
        return parse_json(path, text), Lines(text, True)
    return parse_yaml(path, text), Lines(text, False)


def parse_json(path, text):
    """The value of JSON text without duplicate keys or NaN. Raises SpecError."""
    def pairs(items):
        value = dict(items)
        if len(value) < len(items):
            names = [name for name, _ in items]
            double = next(name for name in names if names.count(name) > 1)
            raise SpecError([f'{path}: the key "{double}" occurs twice in one object'])
        return value

    def constant(name):
        raise SpecError([f"{path}: {name} is not JSON"])

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise SpecError([f"{path} line {error.lineno}: not JSON: {error.msg} (column "
                         f"{error.colno})"]) from None
    except RecursionError:
        raise SpecError([f"{path}: nested too deeply"]) from None


def parse_yaml(path, text):
    """The value of YAML text by the core schema of YAML 1.2. Raises SpecError, MissingPackage."""
    try:
        import yaml
    except ImportError:
        raise MissingPackage("PyYAML", f"{path}: reading YAML") from None
    try:
        return yaml.load(text, core_loader(yaml))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise SpecError([f"{path}{line}: not YAML: {error.problem or error.context}"]) from None
    except yaml.YAMLError as error:
        raise SpecError([f"{path}: not YAML: {str(error).splitlines()[0]}"]) from None
    except RecursionError:
        raise SpecError([f"{path}: nested too deeply"]) from None


def core_loader(yaml):
    """A safe loader with the core schema: 1:5, 12:30, no and 2024-01-01 stay texts, 010 is 10."""
    class CoreLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        yaml_implicit_resolvers = {}

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(
                        None, None, f'the key "{key.value}" occurs twice', key.start_mark)
                seen.add(key.value if isinstance(key.value, str) else id(key))
            return super().construct_mapping(node, deep)

    def integer(loader, node):
        text = loader.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)

    tag = "tag:yaml.org,2002:"
    for name, pattern, first in (
            ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
            ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
            ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
            ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?",
             list("-+0123456789.")),
            ("merge", r"<<", ["<"])):
        CoreLoader.add_implicit_resolver(tag + name, re.compile(rf"^(?:{pattern})$"), first)
    CoreLoader.add_constructor(tag + "int", integer)
    CoreLoader.add_constructor(tag + "float", lambda loader, node: float(
        loader.construct_scalar(node)))
    return CoreLoader


# ---- checking records against the tables

def is_of(value, kind):
    """Whether a value is of a type of SPEC_FIELDS."""
    import signal
    if kind in ("count", "positive", "int"):
        least = {"count": 0, "positive": 1, "int": -2**63}[kind]
        return type(value) is int and least <= value < 2**63
    if kind == "byte":
        return type(value) is int and 1 <= value <= 255
    if kind in ("strs", "ints"):
        return isinstance(value, list) and all(
            isinstance(item, str) if kind == "strs" else type(item) is int for item in value)
    if kind == "name":
        return isinstance(value, str) and bool(value.strip()) and "\0" not in value
    if kind == "number":
        return type(value) in (int, float)
    if kind == "signal":
        return isinstance(value, str) and isinstance(getattr(signal, value, None), signal.Signals)
    readers = {"memory": parse_memory, "duration": parse_duration, "walltime": parse_walltime,
               "slurm memory": slurm_memory}
    if kind in readers:
        try:
            readers[kind](value)
            return kind == "slurm memory" or isinstance(value, str)
        except (ValueError, TypeError):
            return False
    types = {"str": str, "bool": bool, "list": list, "map": dict, "json": (dict, str)}
    return kind == "any" or isinstance(value, types[kind])


def fault_of(value, rule):
    """What is wrong with a field's value by its rule, or None."""
    kind, _, choices = rule.partition(":")
    kind = kind.rstrip("!")
    if kind == "enum":
        known = choices.split("|")
        if value in known:
            return None
        return f"{value!r:.80} is not one of {', '.join(known)}{nearest(value, known)}"
    return None if is_of(value, kind) else f"{value!r:.80} is not {EXPECTED[kind]}"


def check_fields(problems, path, record, table, what):
    """The fields of a record that are known, of their type and not null; notes all errors."""
    rules = SPEC_FIELDS[table]
    if not isinstance(record, dict):
        problems.add(path, f"{what} is {record!r:.60}, not a mapping")
        return {}
    good = {}
    for name, value in record.items():
        rule = rules.get(name)
        if rule is None:
            hint = HINTS.get(name) or nearest(name, rules)
            problems.add((*path, name), f"{what}: unknown field {name!r}{hint}")
        elif value is not None:
            if rule == "str" and isinstance(value, str):
                good[name] = value
                continue
            fault = fault_of(value, rule)
            if fault:
                problems.add((*path, name), f"{what}: {name}: {fault}")
            else:
                good[name] = value
    for name, rule in rules.items():
        if "!" in rule.partition(":")[0] and record.get(name) is None:
            problems.add(path, f"{what}: the field {name} is missing")
    return good


HINTS = {"slurm_config": " (it was removed: use slurm_defaults and execution_config)",
         "env": " (set variables in the command or with invocation_script)",
         "retries": " (use a failure_handler)"}


def title(table, number, record):
    """How messages call a record: job "post", or job number 3."""
    name = record.get("name") if isinstance(record, dict) else None
    return f'{table} "{name}"' if isinstance(name, str) and name else f"{table} number {number + 1}"


# ---- parameters

def number_of(text, exact=True):
    """The int or float that a text spells, or None; exact: only if it prints as it is written."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
            return value if math.isfinite(value) and (not exact or repr(value) == text) else None
    return None


def parameter_values(value):
    """The values of a parameter: a list, one value, or a text such as "1:5" or "['a','b']".

    Raises ValueError with what is wrong.
    """
    if isinstance(value, list):
        if not value:
            raise ValueError("is an empty list")
        if not all(isinstance(item, (str, int, float)) for item in value):
            raise ValueError(f"{value!r:.60} has values that are neither texts nor numbers")
        return value
    if not isinstance(value, str):
        if isinstance(value, (int, float)):
            return [value]
        raise ValueError(f"{value!r:.60} is neither a list, a text nor a number")
    text = value.strip()
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1].strip()
    if text.startswith("[") and text.endswith("]"):
        words = [word.strip() for word in text[1:-1].split(",")]
        if words == [""]:
            raise ValueError(f"{value!r} is an empty list")
        numbers = [number_of(word) for word in words]
        return numbers if None not in numbers else [word.strip("'\"") for word in words]
    parts = [part.strip() for part in text.split(":")]
    if len(parts) in (2, 3) and all(number_of(part, False) is not None for part in parts):
        return range_values(value, parts)
    number = number_of(text)
    return [text if number is None else number]


def range_values(text, parts):
    """Inclusive range start:stop[:step] of ints or floats. Raises ValueError when empty."""
    numbers = [number_of(part, False) for part in parts]
    start, stop, step = (*numbers, 1)[:3]
    if step == 0:
        raise ValueError(f"{text!r} has the step 0")
    if (stop - start) * step < 0:
        raise ValueError(f"{text!r} is empty: from {parts[0]} to {parts[1]} the step must be "
                         f"{'negative' if stop < start else 'positive'}")
    count = int((stop - start) / step + 1e-10) + 1
    if count > MOST_JOBS:
        raise ValueError(f"{text!r} has {count} values, more than {MOST_JOBS}")
    if all(isinstance(number, int) for number in (start, stop, step)):
        return [start + index * step for index in range(count)]
    digits = max(len(part.partition(".")[2]) if "e" not in part.lower() else 15 for part in parts)
    return [round(start + index * step, digits) for index in range(count)]


def plain(value):
    """A parameter's value in a text: 1.0 is 1."""
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def substitute(text, values):
    """Put parameter values in place of {name} and {name:03d}; ${name} is the shell's and stays.

    Raises ValueError when a format does not suit a value.
    """
    if "{" not in text:
        return text

    def put(match):
        dollar, name, layout = match.groups()
        if dollar or name not in values:
            return match[0]
        if layout is None:
            return plain(values[name])
        try:
            return format(values[name], layout)
        except (ValueError, TypeError):
            raise ValueError(f"{match[0]} does not suit the value {values[name]!r}") from None

    return PLACEHOLDER.sub(put, text)


def own_parameters(problems, path, record, shared, what):
    """{name: values} of a record in order, those of use_parameters first; local ones win.

    None when one of them is wrong: then nothing can be expanded.
    """
    wanted = {}
    for name in record.get("use_parameters", ()):
        if name in shared:
            wanted[name] = shared[name]
        else:
            problems.add((*path, "use_parameters"), f"{what}: use_parameters names no parameter "
                         f"{name!r} of the workflow{nearest(name, shared)}")
    wanted.update(record.get("parameters", {}))
    found = {}
    for name, value in wanted.items():
        try:
            found[str(name)] = parameter_values(value)
        except ValueError as error:
            problems.add((*path, "parameters"), f"{what}: parameter {name}: {error}")
    complete = set(found) == {*record.get("use_parameters", ()), *record.get("parameters", {})}
    return found if complete else None


def combinations(problems, path, record, found, what):
    """All combinations of parameter values as dicts, in declared order."""
    names = list(found)
    if record.get("parameter_mode") == "zip":
        first = names[0]
        for name in names[1:]:
            if len(found[name]) != len(found[first]):
                problems.add(path, f"{what}: parameter_mode zip needs lists of one length: "
                             f"{first} has {len(found[first])} values, {name} has "
                             f"{len(found[name])}")
                return []
        rows = zip(*found.values())
    else:
        number = math.prod(len(values) for values in found.values())
        if number > MOST_JOBS:
            problems.add(path, f"{what}: {number} combinations of parameters, more than "
                               f"{MOST_JOBS}")
            return []
        rows = itertools.product(*found.values())
    return [dict(zip(names, row)) for row in rows]


def expand(problems, path, record, shared, what):
    """The records that one with parameters stands for.

    Combinations that give the same name are one record: its lists hold what all of them give, in
    order (the documented fan-in), and its other fields must agree.
    """
    if "parameters" not in record and "use_parameters" not in record:
        return [record]
    found = own_parameters(problems, path, record, shared, what)
    record = {name: value for name, value in record.items() if name not in PARAMETERIZED or
              name == "parameter_mode"}
    if found is None:
        return []
    if not found:
        return [record]
    rows = combinations(problems, path, record, found, what)
    record.pop("parameter_mode", None)
    merged = {}
    for row in rows:
        one = {}
        for name, value in record.items():
            try:
                if isinstance(value, str):
                    value = substitute(value, row)
                elif isinstance(value, list):
                    value = [substitute(item, row) for item in value]
            except ValueError as error:
                problems.add((*path, name), f"{what}: {name}: {error}")
                return []
            one[name] = value
        if not merge(problems, path, merged, one, what):
            return []
    return [{name: list(value) if isinstance(value, dict) and isinstance(record[name], list)
             else value for name, value in one.items()} for one in merged.values()]


def merge(problems, path, merged, one, what):
    """Add an expanded record to those with its name; says whether its fields agree."""
    before = merged.get(one["name"])
    if before is None:
        merged[one["name"]] = {name: dict.fromkeys(value) if isinstance(value, list) else value
                               for name, value in one.items()}
        return True
    for name, value in one.items():
        if isinstance(value, list):
            before[name].update(dict.fromkeys(value))
        elif before[name] != value:
            problems.add((*path, name), f"{what}: {name} differs between combinations of "
                         f"parameters that all give the name {one['name']!r}: put the "
                         "placeholder into the name, too")
            return False
    return True


def leftover(text):
    """The first placeholder in a text that no parameter has filled, or None."""
    match = PLACEHOLDER.search(text) if "{" in text else None
    return match[0] if match and not match[1] else None


# ---- the whole specification

class Reader:
    """Turns a parsed specification into a payload; one object for one file."""

    def __init__(self, problems, top):
        self.problems, self.top = problems, top
        self.records = {name: [] for name in LISTS}       # expanded
        self.paths = {name: [] for name in LISTS}         # where each comes from
        self.index = {}                                   # list: {name: index}
        self.before = {}                                  # list: number before expansion
        self.warnings = []

    def read(self):
        """Check and expand all lists, resolve all names; returns the payload's lists."""
        self.shared = self.top.get("parameters", {})
        for name in LISTS:
            self._list(name)
        for name in LISTS:
            self._names(name)
        self._handlers()
        self.jobs = [self._job(job, path) for job, path in
                     zip(self.records["jobs"], self.paths["jobs"])]
        self.actions = [self._action(number, action)
                        for number, action in enumerate(self.top.get("actions", ()))]
        self._cycles()

    def _list(self, name):
        """Check the records of a list and expand their parameters."""
        table, given = LISTS[name], self.top.get(name, ())
        self.before[name] = len(given)
        records, paths = self.records[name], self.paths[name]
        for number, raw in enumerate(given):
            path, what = (name, number), title(table, number, raw)
            record = check_fields(self.problems, path, raw, table, what)
            if "name" not in record:
                continue
            for one in expand(self.problems, path, record, self.shared, what):
                open_name = leftover(one["name"])
                if open_name and table in ("job", "file"):
                    self.problems.add((*path, "name"), f"{what}: name: {open_name} is no parameter "
                                      f"of this {table}")
                records.append(one)
                paths.append(path)
            if len(records) > MOST_JOBS:
                self.problems.add(path, f"more than {MOST_JOBS} {name} after expansion")
                return

    def _names(self, name):
        """Index a list by name; names must be unique."""
        index = self.index[name] = {}
        for number, record in enumerate(self.records[name]):
            if record["name"] in index:
                self.problems.add(self.paths[name][number],
                                  f'{LISTS[name]} name "{record["name"]}" is used twice')
            index.setdefault(record["name"], number)
        if "default" in index and name == "resource_requirements":
            self.problems.add(self.paths[name][index["default"]], 'resource requirements name '
                              '"default" is reserved for those every workflow has')

    def _handlers(self):
        """Check the rules of failure handlers."""
        for handler, path in zip(self.records["failure_handlers"], self.paths["failure_handlers"]):
            for number, rule in enumerate(handler.get("rules", ())):
                what = f'failure handler "{handler["name"]}" rule {number + 1}'
                good = check_fields(self.problems, (*path, "rules", number), rule, "rule", what)
                if isinstance(rule, dict) and not rule.get("exit_codes") and not good.get(
                        "match_all_exit_codes"):
                    self.problems.add((*path, "rules", number), f"{what}: it has neither "
                                      "exit_codes nor match_all_exit_codes, so it never applies")

    def _find(self, path, what, field, name, which):
        """Index of a named record, or None with an error that suggests the nearest name."""
        number = self.index[which].get(name)
        if number is None:
            open_name = leftover(name)
            hint = (f": {open_name} is no parameter of it" if open_name
                    else nearest(name, self.index[which]))
            self.problems.add((*path, field), f"{what}: {field} names no "
                              f"{LISTS[which]} {name!r}{hint}")
        return number

    def _match(self, path, what, field, pattern, which):
        """Indexes of the records whose name a regex finds."""
        try:
            search = re.compile(pattern).search
        except re.error as error:
            self.problems.add((*path, field), f"{what}: {field}: {pattern!r} is no regular "
                              f"expression: {error}")
            return []
        found = [number for name, number in self.index[which].items() if search(name)]
        if not found:
            self.problems.add((*path, field), f"{what}: {field}: {pattern!r} matches no "
                              f"{LISTS[which]}")
        return found

    def _job(self, job, path):
        """A job with indexes in place of names."""
        what = f'job "{job["name"]}"'
        made = {name: job[name] for name in (
            "name", "command", "priority", "cancel_on_blocking_job_failure",
            "supports_termination") if name in job}
        if job.get("invocation_script"):
            made["invocation_script"] = job["invocation_script"]
        for field, which in JOB_NAMES.items():
            if field in job and not (field == "resource_requirements" and job[field] == "default"):
                number = self._find(path, what, field, job[field], which)
                if number is not None:
                    made[field] = number
        for field, (which, regexes) in JOB_LISTS.items():
            numbers = [self._find(path, what, field, name, which) for name in job.get(field, ())]
            for pattern in job.get(regexes, ()):
                numbers += self._match(path, what, regexes, pattern, which)
            if numbers:
                made[field] = list(dict.fromkeys(number for number in numbers
                                                 if number is not None))
        if "stdio" in job:
            made["stdio"] = compact(check_fields(self.problems, (*path, "stdio"), job["stdio"],
                                                 "stdio", f"{what}: stdio"))
        for field in ("command", "invocation_script"):
            if "${" in made.get(field, ""):
                made[field] = self._variables(made, path, what, field)
        return made

    def _variables(self, made, path, what, field):
        """Replace ${files.input.NAME} and its like, and record the relation each implies."""
        def put(match):
            which, way, name = match.groups()
            number = self._find(path, what, field, name, which)
            if number is None:
                return match[0]
            relation = f"{way}_{which}"
            made.setdefault(relation, [])
            if number not in made[relation]:
                made[relation].append(number)
            record = self.records[which][number]
            if which == "files":
                return record.get("path", "")
            if record.get("data") is None:
                self.problems.add((*path, field), f"{what}: {field}: {match[0]} has no data yet: "
                                  "let the command ask `torc user-data` for it")
            return compact(record.get("data"))

        done = VARIABLE.sub(put, made[field])
        for match in NEARLY_VARIABLE.finditer(VARIABLE.sub("", made[field])):
            self.problems.add((*path, field), f"{what}: {field}: {match[0]} is none of "
                              "${files.input.NAME}, ${files.output.NAME}, ${user_data.input.NAME}, "
                              "${user_data.output.NAME}")
        return done

    def _action(self, number, raw):
        """An action with indexes in place of names."""
        path, what = ("actions", number), f"action {number + 1}"
        action = check_fields(self.problems, path, raw, "action", what)
        trigger, kind = action.get("trigger_type"), action.get("action_type")
        jobs = [self._find(path, what, "jobs", name, "jobs") for name in action.get("jobs", ())]
        for pattern in action.get("job_name_regexes", ()):
            jobs += self._match(path, what, "job_name_regexes", pattern, "jobs")
        for_jobs = trigger in ("on_jobs_ready", "on_jobs_complete")
        if trigger and for_jobs != bool(jobs):
            self.problems.add(path, f"{what}: {trigger} " + (
                "needs jobs or job_name_regexes" if for_jobs else "takes no jobs"))
        config = {}
        if kind == "run_commands":
            config = {"commands": action.get("commands", [])}
            if not config["commands"] or not all(line.strip() for line in config["commands"]):
                self.problems.add(path, f"{what}: run_commands needs commands, none of them empty")
        elif kind == "schedule_nodes":
            config = self._schedule(action, path, what)
        made = {"trigger_type": trigger, "action_type": kind, "action_config": config}
        if jobs:
            made["jobs"] = list(dict.fromkeys(job for job in jobs if job is not None))
        if "persistent" in action:
            made["persistent"] = action["persistent"]
        return made

    def _schedule(self, action, path, what):
        """action_config of schedule_nodes."""
        config = {"num_allocations": action.get("num_allocations", 1), "scheduler_type": "slurm"}
        for name in ("scheduler", "scheduler_type"):
            if name not in action:
                self.problems.add(path, f"{what}: schedule_nodes needs {name}")
        if "scheduler" in action:
            config["scheduler"] = self._find(path, what, "scheduler", action["scheduler"],
                                             "slurm_schedulers")
        for name in ("start_one_worker_per_node", "max_parallel_jobs"):
            if name in action:
                config[name] = action[name]
        return config

    def _cycles(self):
        """Jobs must not wait for themselves, directly or through files and user data."""
        if self.problems.found:
            return                        # indexes may be missing
        graph, waits = self._graph()
        free = [node for node, number in waits.items() if number == 0]
        while free:
            for after in graph.get(free.pop(), ()):
                waits[after] -= 1
                if waits[after] == 0:
                    free.append(after)
        stuck = {node for node, number in waits.items() if number}
        if stuck:
            names = self._circle(graph, stuck)
            self.problems.add(self.paths["jobs"][self.index["jobs"][names[0]]],
                              f"jobs wait for each other in a circle: {' -> '.join(names)}")

    def _graph(self):
        """{node: nodes that wait for it} and {node: number it waits for}; nodes are job indexes
        and ("files" or "user_data", index)."""
        graph, waits = {}, dict.fromkeys(range(len(self.jobs)), 0)
        for number, job in enumerate(self.jobs):
            edges = [(other, number) for other in job.get("depends_on", ())]
            for what in ("files", "user_data"):
                edges += [((what, other), number) for other in job.get(f"input_{what}", ())]
                edges += [(number, (what, other)) for other in job.get(f"output_{what}", ())]
            for before, after in edges:
                graph.setdefault(before, []).append(after)
                waits[after] = waits.get(after, 0) + 1
                waits.setdefault(before, 0)
        return graph, waits

    def _circle(self, graph, stuck):
        """Names of the jobs on one circle, the first again at the end."""
        before = {after: node for node in stuck for after in graph.get(node, ()) if after in stuck}
        node, seen = next(iter(before)), []
        while node not in seen:
            seen.append(node)
            node = before[node]
        circle = [*seen[seen.index(node):], node][::-1]
        names = [self.jobs[one]["name"] for one in circle if isinstance(one, int)]
        return names if names[0] == names[-1] and len(names) > 1 else [*names, names[0]]


def check_top(problems, top):
    """Checks of the workflow's own maps; returns what of them goes into its record."""
    record = {name: top[name] for name in (
        "name", "description", "project", "use_pending_failed", "enable_ro_crate",
        *(name for name in SPEC_FIELDS["workflow"] if name.startswith("compute_node_")))
        if name in top}
    metadata = top.get("metadata")
    if isinstance(metadata, dict):
        record["metadata"] = compact(metadata)
    elif metadata:
        try:
            json.loads(metadata)
            record["metadata"] = metadata
        except ValueError:
            problems.add(("metadata",), f"metadata: {metadata!r:.60} is not {EXPECTED['json']}")
    for name in top.get("slurm_defaults", ()):
        if str(name) in NOT_IN_DEFAULTS:
            problems.add(("slurm_defaults", name), f"slurm_defaults: {name} is not allowed here: "
                         "it belongs to a scheduler in slurm_schedulers")
        elif not isinstance(top["slurm_defaults"][name], (str, int, float)):
            problems.add(("slurm_defaults", name),
                         f"slurm_defaults: {name} is not a text or number")
    if top.get("slurm_defaults"):
        record["slurm_defaults"] = compact(top["slurm_defaults"])
    if "resource_monitor" in top:
        monitor = dict(top["resource_monitor"])
        if isinstance(monitor.get("granularity"), str):
            monitor["granularity"] = {"Summary": "summary", "TimeSeries": "time_series"}.get(
                monitor["granularity"], monitor["granularity"])
        record["resource_monitor_config"] = compact({"enabled": True, **check_fields(
            problems, ("resource_monitor",), monitor, "resource_monitor", "resource_monitor")})
    if "execution_config" in top:
        record["execution_config"] = compact(check_execution(problems, top))
    return record


def check_execution(problems, top):
    """execution_config with only fields that its mode knows."""
    path = ("execution_config",)
    config = check_fields(problems, path, top["execution_config"], "execution_config",
                          "execution_config")
    mode = config.get("mode", "direct")
    if mode == "auto":
        mode = "slurm" if top.get("slurm_schedulers") else "direct"
    for names, wanted, other in ((DIRECT_ONLY, "direct", "srun_termination_signal"),
                                 (SLURM_ONLY, "slurm", "termination_signal")):
        for name in names:
            if name in config and mode != wanted:
                hint = f": use {other}" if name.endswith("termination_signal") else ""
                problems.add((*path, name), f"execution_config: {name} belongs to the mode "
                             f"{wanted}, the mode is {mode}{hint}")
    if "stdio" in config:
        config["stdio"] = check_fields(problems, (*path, "stdio"), config["stdio"], "stdio",
                                       "execution_config: stdio")
    if mode == "slurm":
        for number, action in enumerate(top.get("actions", ())):
            if isinstance(action, dict) and action.get("start_one_worker_per_node"):
                problems.add(("actions", number), f"action {number + 1}: start_one_worker_per_node "
                             "belongs to the mode direct, the mode is slurm")
    return config


def scheduler_misfits(reader):
    """(path, sentence, whether it is sure) for jobs that their Slurm scheduler could never run, and
    for those without one that none could run."""
    found = []
    schedulers, needs = (reader.records[name] for name in ("slurm_schedulers",
                                                           "resource_requirements"))
    for job, path in zip(reader.jobs, reader.paths["jobs"]):
        if "resource_requirements" not in job:
            continue
        need = needs[job["resource_requirements"]]
        sure = "scheduler" in job
        own = [schedulers[job["scheduler"]]] if sure else schedulers
        reasons = [misfits_of_scheduler(need, one) for one in own]
        if reasons and all(reasons):
            found += [(path, f'job "{job["name"]}": {reason}', sure) for reason in reasons[0]]
    return found


def misfits_of_scheduler(need, one):
    """Why requirements do not fit into an allocation of a Slurm scheduler, as phrases."""
    walltime, runtime = one.get("walltime", "01:00:00"), need.get("runtime", "PT1H")
    nodes, number = one.get("nodes", 1), need.get("num_nodes", 1)
    gpus = re.search(r"gpu(?::[A-Za-z]\w*)?:(\d+)", one.get("gres") or "")
    checks = (
        (parse_duration(runtime) > parse_walltime(walltime),
         f"runtime {runtime} is longer than the walltime {walltime}"),
        (one.get("mem") and parse_memory(need["memory"]) > slurm_memory(one["mem"]),
         f"memory {need['memory']} is more than the mem {one.get('mem')}"),
        (gpus and need.get("num_gpus", 0) > int(gpus[1]),
         f"{need.get('num_gpus')} GPUs are more than the gres {one.get('gres')}"),
        (number > nodes, f"{number} nodes are more than the {nodes}"))
    return [f"{text} of scheduler \"{one['name']}\"" for wrong, text in checks if wrong]


def payload_of(reader, workflow):
    """The body of POST /workflow_specs."""
    files = []
    for record in reader.records["files"]:
        file = {name: record[name] for name in ("name", "path", "st_mtime") if name in record}
        with contextlib.suppress(OSError, ValueError):
            file["st_mtime"] = os.stat(file["path"]).st_mtime
        files.append(file)
    schedulers = [{"nodes": 1, "walltime": "01:00:00", **record} for record in
                  reader.records["slurm_schedulers"]]
    for record in schedulers:
        if "mem" in record:
            record["mem"] = str(record["mem"])
    return {
        "workflow": workflow, "files": files, "user_data": reader.records["user_data"],
        "resource_requirements": [{"runtime": "PT1H", **record} for record in
                                  reader.records["resource_requirements"]],
        "failure_handlers": [{"name": record["name"], "rules": compact(record["rules"])}
                             for record in reader.records["failure_handlers"]],
        "slurm_schedulers": schedulers, "jobs": reader.jobs, "actions": reader.actions}


def spec_summary(reader, payload):
    """What a specification amounts to, for `torc create --dry-run`."""
    workflow = payload["workflow"]
    return {
        "workflow_name": workflow["name"], "workflow_description": workflow.get("description"),
        "job_count": len(payload["jobs"]), "job_count_before_expansion": reader.before["jobs"],
        "file_count": len(payload["files"]), "file_count_before_expansion": reader.before["files"],
        "user_data_count": len(payload["user_data"]),
        "resource_requirements_count": len(payload["resource_requirements"]),
        "slurm_scheduler_count": len(payload["slurm_schedulers"]),
        "action_count": len(payload["actions"]),
        "has_schedule_nodes_action": any(action["action_type"] == "schedule_nodes"
                                         for action in payload["actions"]),
        "job_names": [job["name"] for job in payload["jobs"]],
        "scheduler_names": [record["name"] for record in payload["slurm_schedulers"]]}


def warnings_of(reader, top):
    """What is allowed but seems odd."""
    found = list(reader.warnings)
    if not reader.jobs:
        found.append("the workflow has no jobs")
    if "compute_node_expiration_buffer_seconds" in top:
        found.append("compute_node_expiration_buffer_seconds is deprecated and has no effect")
    writers = {}
    for job in reader.jobs:
        for number in job.get("output_files", ()):
            writers.setdefault(number, []).append(job["name"])
    for number, names in writers.items():
        if len(names) > 1:
            found.append(f'file "{reader.records["files"][number]["name"]}" is written by '
                         f"{len(names)} jobs ({', '.join(names[:3])})")
    return found


def read_spec(path, text=None, skip_checks=False):
    """Read, expand and check a workflow specification; returns a Spec.

    path: a .yaml, .yml or .json file; with `text` it only names that. skip_checks: jobs that do
    not fit their Slurm scheduler are warnings. Raises SpecError with all errors, MissingPackage.
    """
    value, lines = parse_spec_text(path, read_spec_text(path) if text is None else text)
    problems = Problems(path, lines)
    if not isinstance(value, dict):
        kind = {"list": "a list", "str": "a text"}.get(type(value).__name__, "a single value")
        raise SpecError([f"{path}: the specification is {kind}, not a mapping with name and jobs"])
    top = check_fields(problems, (), value, "workflow", "workflow")
    workflow = check_top(problems, top)
    reader = Reader(problems, top)
    reader.read()
    if not problems.found:
        for where, sentence, sure in scheduler_misfits(reader):
            if sure and not skip_checks:
                problems.add(where, sentence)
            else:
                reader.warnings.append(sentence)
    problems.raise_any()
    payload = payload_of(reader, workflow)
    return Spec(payload, spec_summary(reader, payload), warnings_of(reader, top))


SPEC_EXAMPLES = {
    "hello": """{
  "name": "hello",
  "description": "One job that says hello",
  "jobs": [
    {"name": "hello", "command": "echo Hello from $TORC_JOB_NAME on $(hostname)"}
  ]
}
""",
    "diamond": """{
  "name": "diamond",
  "description": "Four jobs that hand files to each other; the files decide the order",
  "files": [
    {"name": "numbers", "path": "torc_output/diamond/numbers.txt"},
    {"name": "sum",     "path": "torc_output/diamond/sum.txt"},
    {"name": "count",   "path": "torc_output/diamond/count.txt"},
    {"name": "report",  "path": "torc_output/diamond/report.txt"}
  ],
  "jobs": [
    {"name": "prepare",
     "command": "mkdir -p torc_output/diamond && seq 100 > ${files.output.numbers}"},
    {"name": "add",
     "command": "awk '{ s += $1 } END { print s }' ${files.input.numbers} > ${files.output.sum}"},
    {"name": "count",
     "command": "wc -l < ${files.input.numbers} > ${files.output.count}"},
    {"name": "report",
     "command": "paste ${files.input.count} ${files.input.sum} | tee ${files.output.report}"}
  ]
}
""",
    "sweep": """{
  "name": "sweep",
  "description": "A job for each combination of two parameters, and one that gathers them",
  "parameters": {"x": "1:3", "y": [0.5, 2]},
  "files": [
    {"name": "out_{x}_{y}", "path": "torc_output/sweep/{x}_{y}.txt", "use_parameters": ["x", "y"]}
  ],
  "jobs": [
    {"name": "prepare", "command": "mkdir -p torc_output/sweep"},
    {"name": "point_{x}_{y}", "use_parameters": ["x", "y"], "depends_on": ["prepare"],
     "command": "awk 'BEGIN { print {x} * {y} }' > torc_output/sweep/{x}_{y}.txt",
     "output_files": ["out_{x}_{y}"]},
    {"name": "gather", "use_parameters": ["x", "y"], "input_files": ["out_{x}_{y}"],
     "command": "cat torc_output/sweep/*.txt | sort -n | tee torc_output/sweep/all"}
  ]
}
""",
}


# ==================================================================================================
# 5 Store
# ==================================================================================================
# SQL lives in this section and the next one only. Values are always parameters; names in SQL come
# from KINDS and RELATIONS. Statements avoid what SQLite before 3.35 lacks (RETURNING).

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE workflow (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL, user TEXT NOT NULL, description TEXT, timestamp TEXT NOT NULL,
    project TEXT, metadata TEXT,
    compute_node_expiration_buffer_seconds INTEGER,
    compute_node_wait_for_new_jobs_seconds INTEGER NOT NULL DEFAULT 90,
    compute_node_ignore_workflow_completion INTEGER NOT NULL DEFAULT 0,
    compute_node_wait_for_healthy_database_minutes INTEGER NOT NULL DEFAULT 20,
    compute_node_min_time_for_new_jobs_seconds INTEGER NOT NULL DEFAULT 300,
    resource_monitor_config TEXT, slurm_defaults TEXT, slurm_config TEXT, execution_config TEXT,
    use_pending_failed INTEGER, enable_ro_crate INTEGER,
    run_id INTEGER NOT NULL DEFAULT 0,
    is_canceled INTEGER NOT NULL DEFAULT 0, is_archived INTEGER NOT NULL DEFAULT 0,
    has_detected_need_to_run_completion_script INTEGER NOT NULL DEFAULT 0,
    generation INTEGER NOT NULL DEFAULT 1      -- raised by what a waiting client wants to know
);
CREATE TABLE resource_requirements (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    name TEXT NOT NULL, num_cpus INTEGER NOT NULL, num_gpus INTEGER NOT NULL,
    num_nodes INTEGER NOT NULL, memory TEXT NOT NULL, runtime TEXT NOT NULL,
    memory_bytes INTEGER NOT NULL, runtime_s INTEGER NOT NULL      -- the two texts, parsed
);
CREATE INDEX resource_requirements_workflow ON resource_requirements (workflow_id);
CREATE TABLE failure_handler (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    name TEXT NOT NULL, rules TEXT NOT NULL
);
CREATE INDEX failure_handler_workflow ON failure_handler (workflow_id);
CREATE TABLE slurm_scheduler (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    name TEXT NOT NULL, account TEXT NOT NULL, gres TEXT, mem TEXT, nodes INTEGER NOT NULL,
    ntasks_per_node INTEGER, partition TEXT, qos TEXT, tmp TEXT, walltime TEXT NOT NULL, extra TEXT
);
CREATE INDEX slurm_scheduler_workflow ON slurm_scheduler (workflow_id);
CREATE TABLE compute_node (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    hostname TEXT NOT NULL, pid INTEGER NOT NULL, start_time TEXT NOT NULL, duration_seconds REAL,
    is_active INTEGER NOT NULL DEFAULT 0, num_cpus INTEGER NOT NULL, memory_gb REAL NOT NULL,
    num_gpus INTEGER NOT NULL, num_nodes INTEGER NOT NULL, time_limit TEXT,
    scheduler_config_id INTEGER, compute_node_type TEXT NOT NULL, scheduler TEXT,
    boot_id TEXT, pid_started INTEGER,         -- with hostname and pid: whether its runner lives
    output_dir TEXT,                           -- absolute, where the logs of its jobs are
    beats INTEGER NOT NULL DEFAULT 0           -- it has sent a runner_step, so it holds a lease
);
CREATE INDEX compute_node_workflow ON compute_node (workflow_id, is_active);
CREATE TABLE scheduled_compute_node (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    scheduler_id INTEGER NOT NULL, scheduler_config_id INTEGER NOT NULL,
    scheduler_type TEXT NOT NULL, status TEXT NOT NULL
);
CREATE INDEX scheduled_compute_node_workflow ON scheduled_compute_node (workflow_id);
CREATE TABLE job (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    name TEXT NOT NULL, command TEXT NOT NULL, invocation_script TEXT,
    status INTEGER NOT NULL DEFAULT 0,
    cancel_on_blocking_job_failure INTEGER NOT NULL DEFAULT 1,
    supports_termination INTEGER NOT NULL DEFAULT 0,
    resource_requirements_id INTEGER NOT NULL REFERENCES resource_requirements ON DELETE CASCADE,
    scheduler_id INTEGER,
    failure_handler_id INTEGER REFERENCES failure_handler ON DELETE SET NULL,
    attempt_id INTEGER NOT NULL DEFAULT 1, priority INTEGER NOT NULL DEFAULT 0, stdio TEXT,
    unfinished INTEGER NOT NULL DEFAULT 0,     -- dependencies outside the complete set
    cascaded INTEGER NOT NULL DEFAULT 0,       -- 1: canceled only because a dependency failed
    compute_node_id INTEGER REFERENCES compute_node ON DELETE SET NULL
                                               -- the node that may have a process of this job
);
CREATE INDEX job_claim ON job (workflow_id, status, priority DESC, id);
CREATE INDEX job_requirements ON job (resource_requirements_id);
CREATE INDEX job_handler ON job (failure_handler_id) WHERE failure_handler_id IS NOT NULL;
CREATE INDEX job_node ON job (compute_node_id) WHERE compute_node_id IS NOT NULL;
CREATE TABLE job_dependency (
    job_id INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
    depends_on_job_id INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
    PRIMARY KEY (job_id, depends_on_job_id)) WITHOUT ROWID;
CREATE INDEX job_dependency_reverse ON job_dependency (depends_on_job_id, job_id);
CREATE TABLE job_input_hash (
    job_id INTEGER PRIMARY KEY REFERENCES job ON DELETE CASCADE, hash TEXT NOT NULL);
CREATE TABLE file (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    name TEXT NOT NULL, path TEXT NOT NULL, st_mtime REAL
);
CREATE INDEX file_workflow ON file (workflow_id);
CREATE TABLE user_data (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    name TEXT NOT NULL, is_ephemeral INTEGER NOT NULL DEFAULT 0, data TEXT
);
CREATE INDEX user_data_workflow ON user_data (workflow_id);
CREATE TABLE job_input_file (
    job_id INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
    file_id INTEGER NOT NULL REFERENCES file ON DELETE CASCADE,
    PRIMARY KEY (job_id, file_id)) WITHOUT ROWID;
CREATE INDEX job_input_file_reverse ON job_input_file (file_id, job_id);
CREATE TABLE job_output_file (
    job_id INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
    file_id INTEGER NOT NULL REFERENCES file ON DELETE CASCADE,
    PRIMARY KEY (job_id, file_id)) WITHOUT ROWID;
CREATE INDEX job_output_file_reverse ON job_output_file (file_id, job_id);
CREATE TABLE job_input_user_data (
    job_id INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
    user_data_id INTEGER NOT NULL REFERENCES user_data ON DELETE CASCADE,
    PRIMARY KEY (job_id, user_data_id)) WITHOUT ROWID;
CREATE INDEX job_input_user_data_reverse ON job_input_user_data (user_data_id, job_id);
CREATE TABLE job_output_user_data (
    job_id INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
    user_data_id INTEGER NOT NULL REFERENCES user_data ON DELETE CASCADE,
    PRIMARY KEY (job_id, user_data_id)) WITHOUT ROWID;
CREATE INDEX job_output_user_data_reverse ON job_output_user_data (user_data_id, job_id);
CREATE TABLE result (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    job_id INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
    run_id INTEGER NOT NULL, attempt_id INTEGER NOT NULL DEFAULT 1,
    compute_node_id INTEGER NOT NULL REFERENCES compute_node ON DELETE CASCADE,
    return_code INTEGER NOT NULL, exec_time_minutes REAL NOT NULL, completion_time TEXT NOT NULL,
    status INTEGER NOT NULL, peak_memory_bytes INTEGER, avg_memory_bytes INTEGER,
    peak_cpu_percent REAL, avg_cpu_percent REAL, stderr_tail TEXT,
    UNIQUE (job_id, run_id, attempt_id)
);
CREATE INDEX result_workflow ON result (workflow_id);
CREATE INDEX result_node ON result (compute_node_id);
CREATE TABLE latest_result (                   -- what a list of results shows by default
    job_id INTEGER PRIMARY KEY REFERENCES job ON DELETE CASCADE,
    result_id INTEGER NOT NULL REFERENCES result ON DELETE CASCADE
);
CREATE INDEX latest_result_result ON latest_result (result_id);
CREATE TABLE workflow_action (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    trigger_type TEXT NOT NULL, action_type TEXT NOT NULL, action_config TEXT NOT NULL,
    job_ids TEXT, trigger_count INTEGER NOT NULL, required_triggers INTEGER NOT NULL,
    executed INTEGER NOT NULL, executed_at TEXT,
    executed_by INTEGER REFERENCES compute_node ON DELETE SET NULL,
    persistent INTEGER NOT NULL, is_recovery INTEGER NOT NULL
);
CREATE INDEX workflow_action_workflow ON workflow_action (workflow_id);
CREATE INDEX workflow_action_node ON workflow_action (executed_by);
CREATE TABLE action_job (
    job_id INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
    action_id INTEGER NOT NULL REFERENCES workflow_action ON DELETE CASCADE,
    PRIMARY KEY (job_id, action_id)) WITHOUT ROWID;
CREATE INDEX action_job_action ON action_job (action_id);
CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    timestamp INTEGER NOT NULL, data TEXT NOT NULL
);
CREATE INDEX event_workflow ON event (workflow_id)
"""
ACCESS_SCHEMA = """
CREATE TABLE access_group (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, description TEXT,
    created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
INSERT INTO access_group (id, name, description) VALUES (1, 'admin', 'may do everything');
CREATE TABLE user_group_membership (
    id INTEGER PRIMARY KEY AUTOINCREMENT, user_name TEXT NOT NULL,
    group_id INTEGER NOT NULL REFERENCES access_group ON DELETE CASCADE,
    role TEXT NOT NULL, created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    UNIQUE (user_name, group_id)
);
CREATE INDEX user_group_membership_group ON user_group_membership (group_id);
CREATE TABLE workflow_access_group (
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    group_id INTEGER NOT NULL REFERENCES access_group ON DELETE CASCADE,
    created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, PRIMARY KEY (workflow_id, group_id)
) WITHOUT ROWID;
CREATE INDEX workflow_access_group_group ON workflow_access_group (group_id);
CREATE TABLE slurm_stats (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    job_id INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
    run_id INTEGER NOT NULL, attempt_id INTEGER NOT NULL, slurm_job_id TEXT,
    max_rss_bytes INTEGER, max_vm_size_bytes INTEGER, max_disk_read_bytes INTEGER,
    max_disk_write_bytes INTEGER, ave_cpu_seconds REAL, node_list TEXT,
    UNIQUE (workflow_id, job_id, run_id, attempt_id)
);
CREATE INDEX slurm_stats_job ON slurm_stats (job_id);
CREATE TABLE local_scheduler (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workflow_id INTEGER NOT NULL REFERENCES workflow ON DELETE CASCADE,
    memory TEXT NOT NULL, num_cpus INTEGER NOT NULL
);
CREATE INDEX local_scheduler_workflow ON local_scheduler (workflow_id);
"""
ALLOCATION_SCHEMA = """
ALTER TABLE scheduled_compute_node ADD COLUMN output_dir TEXT;
ALTER TABLE scheduled_compute_node ADD COLUMN work_dir TEXT;    -- where its commands run
ALTER TABLE scheduled_compute_node ADD COLUMN note TEXT;        -- how it ended, in Slurm's words
"""
VIEW_SCHEMA = """
ALTER TABLE job ADD COLUMN started_ms INTEGER;                  -- of the attempt that is running
ALTER TABLE workflow ADD COLUMN shape INTEGER NOT NULL DEFAULT 0;
                                           -- raised when jobs or dependencies come or go
CREATE INDEX job_workflow ON job (workflow_id)                  -- pages of a list, by id
"""
# Step n brings a database from user_version n to n + 1.
MIGRATIONS = (SCHEMA, ACCESS_SCHEMA, ALLOCATION_SCHEMA, VIEW_SCHEMA)

# File systems on which several hosts may have the file open, so that WAL's shared memory is unsafe.
NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs|lustre|gpfs|beegfs|cifs|smb|ceph|afs|fuse|panfs|9p|glusterfs")
CHUNK = 900                               # variables in a statement: SQLite before 3.32 takes 999


def file_system(path):
    """Type of the file system that holds `path`, as /proc/self/mountinfo names it, or ''."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                words = line.split()
                if words[2] == wanted:
                    return words[words.index("-") + 1]
    except (OSError, ValueError):
        pass
    return ""


class HostLock:
    """A lock beside a database on a network file system, which only one host may have open.

    Processes of one host share it unless one is a server, which excludes all others. The file
    names host and pid of whoever locked it first.
    """

    def __init__(self, path, exclusive):
        import fcntl
        import socket
        host = socket.gethostname()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(self.fd, 0)
            os.pwrite(self.fd, compact({"host": host, "pid": os.getpid()}).encode(), 0)
            if not exclusive:
                fcntl.flock(self.fd, fcntl.LOCK_SH)
        except BlockingIOError:
            self._share(path, host, exclusive)
        except OSError as error:
            os.close(self.fd)
            raise Unreachable(f"file locks do not work in {os.path.dirname(path)} "
                              f"({error.strerror}): name a --database on a local disk") from None

    def _share(self, path, host, exclusive):
        import fcntl
        try:
            holder = json.loads(os.pread(self.fd, 1000, 0))
        except ValueError:
            holder = {}
        try:
            if exclusive or holder.get("host") != host:
                raise BlockingIOError
            fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.fd)
            raise Unreachable(
                f"database {path[:-5]} is in use on host {holder.get('host', 'unknown')} "
                f"(pid {holder.get('pid', 'unknown')}): work there, or start a server there and "
                "take --url") from None

    def close(self):
        """Release the lock."""
        os.close(self.fd)


SEVERITIES = ("debug", "info", "warning", "error")
EVENT_QUEUE = 512                         # events that may wait for one who listens


class Subscription:
    """The events of a workflow as one client is to see them, in the form of server-sent events.

    severity: of SEVERITIES, the least that is shown. At most EVENT_QUEUE events wait; what is more
    is counted, and told by an event of type warning.
    """

    def __init__(self, store, workflow_id, severity):
        self.store, self.workflow_id = store, workflow_id
        self.least = SEVERITIES.index(severity)
        self.texts, self.dropped = [], 0
        self.changed = threading.Condition()

    def put(self, severity, text, number=1):
        """Add an event; text None: so many that are not worth writing."""
        if severity < self.least:
            return
        with self.changed:
            if text is None or len(self.texts) >= EVENT_QUEUE:
                self.dropped += number
            else:
                self.texts.append(text)
            self.changed.notify()

    def take(self, seconds):
        """What has come, as bytes, b"" if nothing did in so many seconds; None at the end."""
        with self.changed:
            if not self.texts and not self.dropped and not self.store.closing:
                self.changed.wait(seconds)
            texts, dropped = self.texts, self.dropped
            self.texts, self.dropped = [], 0
        if dropped:
            texts.append(f'event: warning\ndata: {{"dropped":{dropped}}}\n\n')
        return "".join(texts).encode() if texts or not self.store.closing else None

    def close(self):
        """Listen no more."""
        self.store.unsubscribe(self)


class Store:
    """A database file: one writer at a time, readers beside it, and news for those who wait.

    path: the file, created (mode 0600) if absent. server: True excludes other hosts and processes
    on a network file system. shared: other processes may write, so waiting looks once a second.
    Raises Unreachable when the file cannot be used.
    """

    def __init__(self, path, server=False, shared=False, network=None):
        self.path = os.path.abspath(path)
        self.shared = shared
        self.heard = {}                   # compute node: (time.monotonic() of its last step, step)
        self.closing = False
        self.kept = {}                    # what views of large workflows have worked out already
        self.keeping = threading.RLock()
        self._lock = threading.RLock()    # before SQLite's own: nobody sleeps in its handler
        self._writer_thread = None
        self._news = set()
        self._events = []                 # of this transaction, for those who listen
        self._listening = {}              # workflow: tuple of Subscriptions
        self._waiting = {}                # workflow: [condition, number of waiters]
        self._waiting_lock = threading.Lock()
        self._readers = []
        self._host_lock = None
        try:
            # Closing any descriptor of a database drops the locks that this process has on it.
            if not os.path.isfile(self.path):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            elif not os.access(self.path, os.R_OK | os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise Unreachable(f"database {path}: {error.strerror}: name another with "
                              "--database FILE") from None
        if network is None:
            network = bool(NETWORK_FILE_SYSTEMS.search(file_system(self.path)))
        self._network = network
        if network:
            self._host_lock = HostLock(self.path + ".lock", server)
        self._writer = self._connect()
        self._migrate()
        self.id = self.one("SELECT value FROM meta WHERE key = 'id'")[0]

    def _connect(self):
        import sqlite3
        try:
            connection = sqlite3.connect(self.path, timeout=45, isolation_level=None,
                                         check_same_thread=False)
            connection.execute("PRAGMA foreign_keys = ON")
            self._set_journal_mode(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA journal_size_limit = 67108864")
            return connection
        except sqlite3.Error as error:
            raise self._trouble(error) from None

    def _set_journal_mode(self, connection):
        """WAL on a local disk. Two who open a new file at once: SQLite tells one of them "locked"
        without its busy handler's waiting (sqlite.org/wal.html), so we wait here."""
        import sqlite3
        deadline = time.monotonic() + 45
        while True:
            try:
                connection.execute(f"PRAGMA journal_mode = {'DELETE' if self._network else 'WAL'}")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _trouble(self, error):
        """What an error of SQLite means to the user."""
        text = str(error)
        if "locked" in text or "busy" in text:
            text = ("locked by another process for 45 s: end that process, or name another "
                    "--database")
        elif "not a database" in text:
            text = "not an SQLite database: name another with --database FILE"
        elif "full" in text:
            text = "the disk is full, so nothing was changed: free some space and try again"
        elif "readonly" in text:
            text = "not writable by you: name another with --database FILE"
        return Unreachable(f"database {self.path}: {text}")

    def _migrate(self):
        import secrets
        version = self.one("PRAGMA user_version")[0]
        if version == len(MIGRATIONS):
            return
        with self.transaction():
            version = self.one("PRAGMA user_version")[0]
            if version > len(MIGRATIONS):
                raise Unreachable(f"database {self.path} was made by a newer torc (its schema is "
                                  f"{version}, this program knows {len(MIGRATIONS)}): use that one")
            if version == 0 and self.one("SELECT count(*) FROM sqlite_master")[0]:
                raise Unreachable(f"database {self.path} belongs to another program: name another "
                                  "with --database FILE")
            for step in MIGRATIONS[version:]:
                for statement in re.sub(r"--[^\n]*", "", step).split(";"):
                    self.execute(statement)
            self.execute("INSERT OR IGNORE INTO meta VALUES ('id', ?)", (secrets.token_hex(8),))
            self.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def wake(self):
        """End all waiting, now and in future: the program is about to stop."""
        self.closing = True
        with self._waiting_lock:
            waiting = [condition for condition, _ in self._waiting.values()]
            waiting += [one.changed for many in self._listening.values() for one in many]
        for condition in waiting:
            with condition:
                condition.notify_all()

    def close(self):
        """Wake all who wait and close the file."""
        self.wake()
        with self._lock:
            for connection in (*self._readers, self._writer):
                connection.close()
            self._readers = []
        if self._host_lock:
            self._host_lock.close()

    # ---- transactions and queries

    @contextlib.contextmanager
    def transaction(self):
        """The only BEGIN IMMEDIATE / COMMIT / ROLLBACK. Not to be nested."""
        import sqlite3
        news = set()
        with self._lock:
            self._news = set()
            self._events = []
            self._writer_thread = threading.get_ident()
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield
                self._writer.execute("COMMIT")
                news = self._news
                if self._events:
                    self._publish(self._events)
            except sqlite3.IntegrityError as error:
                raise Internal(f"the store refuses this: {error}") from None
            except (sqlite3.OperationalError, sqlite3.DatabaseError) as error:
                raise self._trouble(error) from error
            finally:
                self._writer_thread = None
                if self._writer.in_transaction:      # SQLite may have rolled back by itself
                    self._writer.execute("ROLLBACK")
        for workflow_id in news:
            self._tell(workflow_id)

    def execute(self, sql, params=()):
        """Run a statement inside the transaction of this thread; returns the number of rows."""
        return self._writer.execute(sql, params).rowcount

    def insert(self, sql, params=()):
        """Run an INSERT inside the transaction of this thread; returns the new id."""
        return self._writer.execute(sql, params).lastrowid

    def insert_many(self, head, width, rows):
        """Insert `rows` (tuples of `width` values) with few statements; head: INSERT INTO t (c)."""
        per_statement = max(1, CHUNK // width)
        one = "(" + ", ".join("?" * width) + ")"
        for start in range(0, len(rows), per_statement):
            chunk = rows[start:start + per_statement]
            self._writer.execute(f"{head} VALUES " + ", ".join([one] * len(chunk)),
                                 [value for row in chunk for value in row])

    def query(self, sql, params=()):
        """All rows of a SELECT, as tuples; inside a transaction it sees what that has written."""
        import sqlite3
        if self._writer_thread == threading.get_ident():
            return self._writer.execute(sql, params).fetchall()
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = self._connect()
        try:
            return connection.execute(sql, params).fetchall()
        except sqlite3.Error as error:
            raise self._trouble(error) from error
        finally:
            self._readers.append(connection)

    def one(self, sql, params=()):
        """The first row of a SELECT, or None."""
        rows = self.query(sql, params)
        return rows[0] if rows else None

    def bulk(self, sql, width, params=()):
        """All rows of a SELECT of `width` columns, fetched as one row of JSON: with another thread
        busy, every row fetched by itself would wait for the interpreter's lock. Floats keep 15
        digits."""
        names = ", ".join(f"c{number}" for number in range(width))
        return json.loads(self.one(f"WITH q ({names}) AS ({sql}) SELECT "
                                   f"json_group_array(json_array({names})) FROM q", params)[0])

    # ---- news

    def news(self, workflow_id):
        """Inside a transaction: wake those who wait for this workflow once it is committed."""
        if workflow_id not in self._news:
            self._news.add(workflow_id)
            self.execute("UPDATE workflow SET generation = generation + 1 WHERE id = ?",
                         (workflow_id,))

    def _tell(self, workflow_id):
        with self._waiting_lock:
            condition = self._waiting.get(workflow_id, [None])[0]
        if condition:
            with condition:
                condition.notify_all()

    # ---- events, for those who listen as they happen

    def subscribe(self, workflow_id, severity):
        """A Subscription to the events of a workflow, to be closed by the caller."""
        one = Subscription(self, workflow_id, severity)
        with self._waiting_lock:
            self._listening[workflow_id] = (*self._listening.get(workflow_id, ()), one)
        return one

    def unsubscribe(self, subscription):
        """See Subscription.close."""
        workflow_id = subscription.workflow_id
        with self._waiting_lock:
            left = tuple(one for one in self._listening.get(workflow_id, ())
                         if one is not subscription)
            if left:
                self._listening[workflow_id] = left
            else:
                self._listening.pop(workflow_id, None)

    def is_heard(self, workflow_id):
        """Whether anybody listens to the events of a workflow; else none need be told."""
        return workflow_id in self._listening

    def tell(self, workflow_id, kind, severity, data, number=1):
        """Inside a transaction: an event, sent to those who listen once it is committed.

        data: a dict, or None for so many events that would only overflow the queues.
        """
        if len(self._events) >= EVENT_QUEUE:
            data = None
        self._events.append((workflow_id, kind, severity, data, number))

    def _publish(self, events):
        timestamp = int(time.time() * 1000)
        for workflow_id, kind, severity, data, number in events:
            text = data if data is None else f"event: {kind}\ndata: " + compact({
                "workflow_id": workflow_id, "timestamp": timestamp, "event_type": kind,
                "severity": severity, "data": data}) + "\n\n"
            for one in self._listening.get(workflow_id, ()):
                one.put(SEVERITIES.index(severity), text, number)

    def wait_news(self, workflow_id, since, seconds):
        """Wait until the workflow's generation differs from `since`, at most `seconds`."""
        deadline = time.monotonic() + seconds
        with self._waiting_lock:
            entry = self._waiting.setdefault(workflow_id, [threading.Condition(), 0])
            entry[1] += 1
        try:
            with entry[0]:
                while not self.closing:
                    row = self.one("SELECT generation FROM workflow WHERE id = ?", (workflow_id,))
                    left = deadline - time.monotonic()
                    if not row or row[0] != since or left <= 0:
                        break
                    entry[0].wait(min(left, 1.0) if self.shared else left)
        finally:
            with self._waiting_lock:
                entry[1] -= 1
                if not entry[1]:
                    self._waiting.pop(workflow_id, None)


# ---- records: the generic operations, for any row of KINDS

def to_column(field, value):
    """A JSON value as SQLite keeps it."""
    if value is None:
        return None
    if field.type == "status":
        return STATUS_OF_NAME[value]
    return compact(value) if field.type == "any" else value


FROM_COLUMN = {"bool": bool, "status": STATUS_NAMES.__getitem__, "any": json.loads}


def columns(kind):
    """The fields of a kind that are columns of its table."""
    return [field for field in kind.fields
            if field.type not in ("ints", "echo") and field.name != "status_id"]


def to_record(kind_columns, row):
    """A row as a client sees it: absent values are left out."""
    record = {}
    for field, value in zip(kind_columns, row):
        if value is not None:
            convert = FROM_COLUMN.get(field.type)
            record[field.name] = convert(value) if convert else value
    return record


def not_found(kind, record_id):
    """The error for a record that is not there."""
    return NotFound(f"{kind.name[0].upper()}{kind.name[1:]} not found with ID: {record_id}")


def fetch(store, kind, record_id):
    """One record by id, as a dict. Raises NotFound."""
    kind_columns = columns(kind)
    row = store.one(f"SELECT {', '.join(field.name for field in kind_columns)} FROM {kind.table} "
                    "WHERE id = ?", (record_id,))
    if not row:
        raise not_found(kind, record_id)
    return to_record(kind_columns, row)


def add(store, kind, values):
    """Insert a record from a checked body; returns its id."""
    given = [field for field in columns(kind)
             if not field.server and values.get(field.name) is not None]
    return store.insert(
        f"INSERT INTO {kind.table} ({', '.join(field.name for field in given)}) "
        f"VALUES ({', '.join('?' * len(given))})",
        [to_column(field, values[field.name]) for field in given])


def change(store, kind, record_id, values):
    """Update the fields that `values` has, but never the workflow a record belongs to."""
    given = [field for field in columns(kind) if not field.server
             and field.name in values and field.name != "workflow_id"]
    if given:
        pairs = ", ".join(f"{field.name} = ?" for field in given)
        store.execute(f"UPDATE {kind.table} SET {pairs} WHERE id = ?",
                      [to_column(field, values[field.name]) for field in given] + [record_id])


def remove(store, kind, record_id):
    """Delete a record; SQLite's cascades take what hangs on it."""
    store.execute(f"DELETE FROM {kind.table} WHERE id = ?", (record_id,))


class Page(NamedTuple):
    """Which part of a list is wanted."""

    offset: int = 0
    limit: int = MAX_LIMIT
    sort_by: str | None = None
    reverse: bool = False


def envelope(items, page, total):
    """The usual answer of a list."""
    return {"items": items, "offset": page.offset, "max_limit": MAX_LIMIT, "count": len(items),
            "total_count": total, "has_more": max(page.offset, 0) + len(items) < total}


def listing(store, kind, page, where, params, without=()):
    """A list envelope of the records for which the SQL condition `where` holds.

    where: text made by this program, with ? for each of `params`; the table is called t.
    """
    kind_columns = [field for field in columns(kind) if field.name not in without]
    sortable = {field.name for field in kind_columns} - set(kind.unsorted.split())
    order = page.sort_by if page.sort_by in sortable else "id"
    direction = "DESC" if page.reverse else "ASC"
    names = ", ".join(f"t.{field.name}" for field in kind_columns)
    source = f"FROM {kind.table} t WHERE {where}"
    total = store.one(f"SELECT count(*) {source}", params)[0]
    part = f"{source} ORDER BY t.{order} {direction}, t.id {direction} LIMIT ? OFFSET ?"
    params = [*params, page.limit, max(page.offset, 0)]
    sql = f"SELECT {names} {part}"
    exact = any(field.type == "float" for field in kind_columns)
    large = min(total, page.limit if page.limit >= 0 else total) > 500
    rows = (store.bulk(sql, len(kind_columns), params) if large and not exact
            else store.query(sql, params))
    return envelope([to_record(kind_columns, row) for row in rows], page, total)


# ==================================================================================================
# 6 Engine
# ==================================================================================================
# What changes the state of jobs and workflows. Functions that write say "in a transaction": the
# caller has opened one. A job's `unfinished` counts its dependencies outside the complete set and
# is kept true by every change of status; `compute_node_id` names the node that may still have a
# process of the job, and a ready job that has one is not handed out, so no two attempts overlap.

NOT_COMPLETE = f"({UNINITIALIZED}, {BLOCKED}, {READY}, {PENDING}, {RUNNING}, {PENDING_FAILED})"
COMPLETE = f"({', '.join(str(status) for status in COMPLETE_SET)})"
IDS = "(SELECT value FROM json_each(?))"  # a list of ids as one parameter, of any length
# Nodes of our runners hold a lease and report what they end; others' are never waited for.
BEATING = "(SELECT id FROM compute_node WHERE workflow_id = ? AND beats = 1 AND is_active = 1)"


class JobRow(NamedTuple):
    """What the engine needs to know of a job before it changes it."""

    id: int
    workflow_id: int
    name: str
    status: int
    attempt_id: int
    compute_node_id: int | None
    cascaded: int


def job_row(store, job_id):
    """The job's row. Raises NotFound."""
    row = store.one(f"SELECT {', '.join(JobRow._fields)} FROM job WHERE id = ?", (job_id,))
    if not row:
        raise not_found(KINDS["job"], job_id)
    return JobRow(*row)


def workflow_row(store, workflow_id, names):
    """The named columns of a workflow. Raises NotFound."""
    row = store.one(f"SELECT {names} FROM workflow WHERE id = ?", (workflow_id,))
    if not row:
        raise not_found(KINDS["workflow"], workflow_id)
    return row


def is_complete(store, workflow_id):
    """Whether the cancel flag is set or no job is outside the complete set or disabled."""
    return bool(store.one(
        "SELECT is_canceled OR NOT EXISTS (SELECT 1 FROM job WHERE workflow_id = workflow.id"
        f" AND status IN {NOT_COMPLETE}) FROM workflow WHERE id = ?", (workflow_id,))[0])


def counts(store, workflow_id):
    """Jobs by status (all eleven names) and the flags of the workflow. Raises NotFound."""
    run_id, canceled, archived = workflow_row(store, workflow_id,
                                              "run_id, is_canceled, is_archived")
    number = dict(store.query("SELECT status, count(*) FROM job WHERE workflow_id = ? "
                              "GROUP BY status", (workflow_id,)))
    answer = {name: number.get(status, 0) for status, name in enumerate(STATUS_NAMES)}
    answer["total"] = sum(number.values())
    open_jobs = answer["total"] - answer["disabled"] - sum(
        number.get(status, 0) for status in COMPLETE_SET)
    return {**answer, "run_id": run_id, "is_canceled": bool(canceled),
            "is_archived": bool(archived), "is_complete": bool(canceled) or not open_jobs}


def store_event(store, workflow_id, now, event):
    """In a transaction: keep an event that clients can list."""
    return store.insert("INSERT INTO event (workflow_id, timestamp, data) VALUES (?, ?, ?)",
                        (workflow_id, int(now * 1000), compact(event)))


# ---- events for those who listen

ENDED_SEVERITY = {COMPLETED: "info", FAILED: "error", CANCELED: "warning", TERMINATED: "warning",
                  PENDING_FAILED: "info"}


def tell_ended(store, workflow_id, status, job_ids, code=None):
    """In a transaction: jobs have ended as `status`. Call it only if the workflow is heard."""
    names = dict(store.query(f"SELECT id, name FROM job WHERE id IN {IDS}",
                             (compact(job_ids[:EVENT_QUEUE]),)))
    said, severity = STATUS_NAMES[status], ENDED_SEVERITY[status]
    for job_id in job_ids[:EVENT_QUEUE]:
        store.tell(workflow_id, f"job_{said}", severity, {
            "job_id": job_id, "job_name": names.get(job_id), "status": said, "return_code": code})
    if len(job_ids) > EVENT_QUEUE:
        store.tell(workflow_id, f"job_{said}", severity, None, len(job_ids) - EVENT_QUEUE)


def tell_started(store, job_id):
    """In a transaction: a job has begun to run. Call it only if the workflow is heard."""
    workflow_id, name, node_id, run_id = store.one(
        "SELECT w.id, j.name, j.compute_node_id, w.run_id FROM job j JOIN workflow w ON w.id ="
        " j.workflow_id WHERE j.id = ?", (job_id,))
    store.tell(workflow_id, "job_started", "info", {
        "job_id": job_id, "job_name": name, "compute_node_id": node_id, "run_id": run_id})


def tell_node(store, node_id, started):
    """In a transaction: a runner has come or gone."""
    names = ("hostname", "pid", "num_cpus", "memory_gb", "num_gpus", "compute_node_type") \
        if started else ("hostname", "pid", "duration_seconds", "compute_node_type")
    row = store.one(f"SELECT workflow_id, {', '.join(names)} FROM compute_node WHERE id = ?",
                    (node_id,))
    if row and store.is_heard(row[0]):
        store.tell(row[0], f"compute_node_{'started' if started else 'stopped'}", "info",
                   {"compute_node_id": node_id, **dict(zip(names, row[1:]))})


# ---- dependencies: counting, freeing, canceling

def reshaped(store, workflow_id):
    """In a transaction: jobs or dependencies have come or gone, or have other names."""
    store.execute("UPDATE workflow SET shape = shape + 1 WHERE id = ?", (workflow_id,))


def recount(store, workflow_id):
    """In a transaction: set `unfinished` of every job from the dependencies' statuses."""
    store.execute(
        "UPDATE job SET unfinished = (SELECT count(*) FROM job_dependency d JOIN job p"
        " ON p.id = d.depends_on_job_id WHERE d.job_id = job.id"
        f" AND p.status NOT IN {COMPLETE}) WHERE workflow_id = ?", (workflow_id,))


def shift_dependents(store, job_ids, difference):
    """In a transaction: jobs entered (-1) or left (+1) the complete set; count their dependents."""
    for job_id in job_ids:
        store.execute("UPDATE job SET unfinished = unfinished + ? WHERE id IN"
                      " (SELECT job_id FROM job_dependency WHERE depends_on_job_id = ?)",
                      (difference, job_id))


def settle(store, workflow_id, candidates):
    """In a transaction: free or cancel those of `candidates` that wait for nothing any more.

    A blocked job is canceled if it wants that and a dependency ended badly: failed, canceled or
    terminated, with a return code other than 0 or with no result (a canceled job has none, so
    that everything downstream of a failure is canceled). Else it is ready. Canceled jobs settle
    their own dependents in turn. Returns the ids made ready.
    """
    freed, ended = [], []
    while candidates:
        waiting = store.query(
            "SELECT id, cancel_on_blocking_job_failure AND EXISTS (SELECT 1 FROM job_dependency d"
            " JOIN job p ON p.id = d.depends_on_job_id LEFT JOIN latest_result l ON l.job_id = p.id"
            " LEFT JOIN result r ON r.id = l.result_id WHERE d.job_id = job.id AND p.status IN"
            f" ({FAILED}, {CANCELED}, {TERMINATED}) AND (r.id IS NULL OR r.return_code <> 0))"
            f" FROM job WHERE id IN {IDS} AND status = {BLOCKED} AND unfinished = 0",
            (compact(candidates),))
        freed += [job_id for job_id, doomed in waiting if not doomed]
        doomed_ids = [job_id for job_id, doomed in waiting if doomed]
        candidates = end_jobs(store, doomed_ids, CANCELED, cascaded=1) if doomed_ids else []
        ended += doomed_ids
    if ended and store.is_heard(workflow_id):
        tell_ended(store, workflow_id, CANCELED, ended)
    if freed:
        store.execute(f"UPDATE job SET status = {READY} WHERE id IN {IDS}", (compact(freed),))
        count_triggers(store, workflow_id, "on_jobs_ready", freed)
    if ended:
        count_triggers(store, workflow_id, "on_jobs_complete", ended)
    return freed


def end_jobs(store, job_ids, status, cascaded=0):
    """In a transaction: put jobs into the complete set; returns the ids of their dependents."""
    text = compact(job_ids)
    store.execute(f"UPDATE job SET status = ?, cascaded = ? WHERE id IN {IDS}",
                  (status, cascaded, text))
    shift_dependents(store, job_ids, -1)
    return [row[0] for row in store.query(
        f"SELECT DISTINCT job_id FROM job_dependency WHERE depends_on_job_id IN {IDS}", (text,))]


def undo_cascade(store, job_ids):
    """In a transaction: jobs that only the cascade below `job_ids` canceled are blocked again."""
    below = [row[0] for row in store.query(
        "WITH RECURSIVE below (id) AS (SELECT j.id FROM job_dependency d JOIN job j"
        f" ON j.id = d.job_id WHERE d.depends_on_job_id IN {IDS} AND j.status = {CANCELED}"
        " AND j.cascaded = 1 UNION SELECT j.id FROM below JOIN job_dependency d"
        " ON d.depends_on_job_id = below.id JOIN job j ON j.id = d.job_id"
        f" WHERE j.status = {CANCELED} AND j.cascaded = 1) SELECT id FROM below",
        (compact(job_ids),))]
    if below:
        store.execute(f"UPDATE job SET status = {BLOCKED}, cascaded = 0 WHERE id IN {IDS}",
                      (compact(below),))
        shift_dependents(store, below, 1)


def leave_complete(store, job, status):
    """In a transaction: a job leaves the complete set; what its failure canceled is undone."""
    if job.status in COMPLETE_SET:
        shift_dependents(store, [job.id], 1)
        undo_cascade(store, [job.id])
    store.execute("UPDATE job SET status = ?, cascaded = 0, started_ms = NULL WHERE id = ?",
                  (status, job.id))


def finish(store, job, status, node=None, code=None):
    """In a transaction: a job's attempt has ended as `status`; free or cancel its dependents.

    node: what compute_node_id becomes (None once no process of the job is left). code: its return
    code, if there is one. Returns the ids made ready.
    """
    store.execute("UPDATE job SET status = ?, compute_node_id = ?, cascaded = 0 WHERE id = ?",
                  (status, node, job.id))
    if store.is_heard(job.workflow_id):
        tell_ended(store, job.workflow_id, status, [job.id], code)
    freed = []
    if status in COMPLETE_SET:
        store.execute("UPDATE job SET unfinished = unfinished - 1 WHERE id IN"
                      " (SELECT job_id FROM job_dependency WHERE depends_on_job_id = ?)", (job.id,))
        dependents = [row[0] for row in store.query(
            "SELECT d.job_id FROM job_dependency d JOIN job j ON j.id = d.job_id WHERE"
            f" d.depends_on_job_id = ? AND j.unfinished = 0 AND j.status = {BLOCKED}", (job.id,))]
        if dependents:
            freed = settle(store, job.workflow_id, dependents)
    count_triggers(store, job.workflow_id, "on_jobs_complete", [job.id])
    return freed


def check_end(store, workflow_id):
    """In a transaction, after jobs have ended: tell and trigger if that was the last one."""
    if is_complete(store, workflow_id):
        store.execute("UPDATE workflow_action SET trigger_count = required_triggers WHERE"
                      " workflow_id = ? AND trigger_type = 'on_workflow_complete'", (workflow_id,))
        store.news(workflow_id)


# ---- initialize and reset

def initialize_jobs(store, workflow_id, only_uninitialized=False, clear_ephemeral=False):
    """In a transaction: derive dependencies, then make every job blocked or ready that should be.

    Upstream: initialize_jobs, both modes. Neither run_id nor attempt_id changes.
    """
    workflow_row(store, workflow_id, "id")
    derive_dependencies(store, workflow_id)
    if clear_ephemeral:
        store.execute("UPDATE user_data SET data = NULL WHERE workflow_id = ? AND is_ephemeral = 1",
                      (workflow_id,))
    if only_uninitialized:
        reset_downstream(store, workflow_id)
    recount(store, workflow_id)
    only = f"AND status = {UNINITIALIZED}" if only_uninitialized else ""
    store.execute(f"UPDATE job SET status = {BLOCKED}, cascaded = 0 WHERE workflow_id = ?"
                  f" AND unfinished > 0 {only}", (workflow_id,))
    store.execute(
        f"UPDATE job SET status = {READY}, cascaded = 0 WHERE workflow_id = ? AND status NOT IN"
        f" ({DISABLED}, {BLOCKED}, {COMPLETED}, {FAILED}, {CANCELED}, {READY})", (workflow_id,))
    recount(store, workflow_id)
    disown(store, workflow_id)
    store.execute("DELETE FROM latest_result WHERE job_id IN (SELECT id FROM job WHERE"
                  f" workflow_id = ? AND status NOT IN {COMPLETE})", (workflow_id,))
    hashes = sorted(input_hashes(store, workflow_id).items())
    store.insert_many("INSERT OR REPLACE INTO job_input_hash (job_id, hash)", 2, hashes)
    reset_actions(store, workflow_id)
    store.news(workflow_id)


def derive_dependencies(store, workflow_id):
    """In a transaction: whoever reads a file or user data depends on whoever writes it."""
    for what, key in (("file", "file_id"), ("user_data", "user_data_id")):
        if store.execute(
                f"INSERT OR IGNORE INTO job_dependency SELECT i.job_id, o.job_id FROM {what} t JOIN"
                f" job_input_{what} i ON i.{key} = t.id JOIN job_output_{what} o ON o.{key} = t.id"
                " WHERE t.workflow_id = ?", (workflow_id,)):
            reshaped(store, workflow_id)


def reset_downstream(store, workflow_id):
    """In a transaction: everything downstream of an uninitialized job becomes uninitialized."""
    store.execute(
        "WITH RECURSIVE below (id) AS (SELECT d.job_id FROM job j JOIN job_dependency d"
        f" ON d.depends_on_job_id = j.id WHERE j.workflow_id = ? AND j.status = {UNINITIALIZED}"
        " UNION SELECT d.job_id FROM below JOIN job_dependency d ON d.depends_on_job_id = below.id)"
        f" UPDATE job SET status = {UNINITIALIZED}, cascaded = 0 WHERE id IN below", (workflow_id,))


def disown(store, workflow_id):
    """In a transaction: jobs that run no more belong to nobody, unless a live runner of ours must
    still end their process and say so."""
    store.execute(
        # The + keeps SQLite from walking the whole workflow: few jobs have a node (index job_node).
        "UPDATE job SET compute_node_id = NULL WHERE +workflow_id = ? AND status NOT IN"
        f" ({PENDING}, {RUNNING}) AND compute_node_id IS NOT NULL"
        f" AND compute_node_id NOT IN {BEATING}", (workflow_id, workflow_id))


def input_hashes(store, workflow_id):
    """Job id: SHA-256 over what decides a job's outcome.

    Command, invocation script, dependencies, input and output files, user data and the contents
    of the user data read. Not: resources, priority, file times. Upstream: the job input hash.
    """
    ids = {name: {} for name in RELATIONS}
    for name, (table, mine, theirs) in RELATIONS.items():
        for job_id, other in store.bulk(
                f"SELECT r.{mine}, r.{theirs} FROM job j JOIN {table} r ON r.{mine} = j.id"
                " WHERE j.workflow_id = ?", 2, (workflow_id,)):
            ids[name].setdefault(job_id, []).append(other)
    contents = dict(store.query("SELECT id, data FROM user_data WHERE workflow_id = ?",
                                (workflow_id,)))
    jobs = store.bulk("SELECT id, command, invocation_script FROM job WHERE workflow_id = ?", 3,
                      (workflow_id,))
    hashes = {}
    for job_id, command, script in jobs:
        parts = [command, script or ""] + [sorted(of_job[job_id]) if job_id in of_job else 0
                                           for of_job in ids.values()]
        read = ids["input_user_data_ids"].get(job_id)
        if read:
            parts.append([contents.get(other) for other in sorted(read)])
        hashes[job_id] = hashlib.sha256(repr(parts).encode()).hexdigest()
    return hashes


def changed_jobs(store, workflow_id):
    """(id, name) of jobs whose input hash differs from the one stored at initialization, by id."""
    stored = store.query(
        "SELECT j.id, j.name, h.hash FROM job j JOIN job_input_hash h ON h.job_id = j.id"
        " WHERE j.workflow_id = ? ORDER BY j.id", (workflow_id,))
    present = input_hashes(store, workflow_id)
    return [(job_id, name) for job_id, name, old in stored if present[job_id] != old]


def reset_jobs(store, workflow_id, failed_only=False):
    """In a transaction: back to uninitialized; returns how many (the dependents not counted).

    failed_only: failed, canceled, terminated and pending_failed jobs, and what of the complete set
    lies downstream of them. Else all jobs, disabled ones included. Upstream: reset_job_status.
    """
    if failed_only:
        which = f"status IN ({FAILED}, {CANCELED}, {TERMINATED}, {PENDING_FAILED})"
        downstream = [row[0] for row in store.query(
            "WITH RECURSIVE below (id) AS (SELECT d.job_id FROM job j JOIN job_dependency d"
            f" ON d.depends_on_job_id = j.id WHERE j.workflow_id = ? AND j.{which}"
            " UNION SELECT d.job_id FROM below JOIN job_dependency d"
            " ON d.depends_on_job_id = below.id) SELECT b.id FROM below b JOIN job j ON j.id = b.id"
            f" WHERE j.status IN {COMPLETE}", (workflow_id,))]
    else:
        which, downstream = f"status <> {UNINITIALIZED}", []
    updated = store.execute(f"UPDATE job SET status = {UNINITIALIZED}, cascaded = 0"
                            f" WHERE workflow_id = ? AND {which}", (workflow_id,))
    store.execute(f"UPDATE job SET status = {UNINITIALIZED}, cascaded = 0 WHERE id IN {IDS}",
                  (compact(downstream),))
    recount(store, workflow_id)
    disown(store, workflow_id)
    store.news(workflow_id)
    return updated


def cancel_workflow(store, workflow_id, user, now):
    """In a transaction: set the flag; pending and running jobs are canceled, others untouched."""
    workflow_row(store, workflow_id, "id")
    jobs = [row[0] for row in store.query(
        f"SELECT id FROM job WHERE workflow_id = ? AND status IN ({PENDING}, {RUNNING})",
        (workflow_id,))]
    end_jobs(store, jobs, CANCELED)
    if jobs and store.is_heard(workflow_id):
        tell_ended(store, workflow_id, CANCELED, jobs)
    disown(store, workflow_id)
    store.execute("UPDATE workflow SET is_canceled = 1 WHERE id = ?", (workflow_id,))
    store_event(store, workflow_id, now, {"category": "workflow_canceled", "user": user,
                                          "workflow_id": workflow_id})
    store.news(workflow_id)


def reset_workflow(store, workflow_id, force, user, now):
    """In a transaction: clear the workflow's flags. Raises Invalid.

    Upstream: reset_workflow_status.
    """
    archived = workflow_row(store, workflow_id, "is_archived")[0]
    if archived:
        raise Invalid(f"workflow {workflow_id} is archived: torc workflows archive false "
                      f"{workflow_id} brings it back")
    busy = store.one("SELECT (SELECT count(*) FROM job WHERE workflow_id = ? AND status IN"
                     f" ({PENDING}, {RUNNING})), (SELECT count(*) FROM scheduled_compute_node"
                     " WHERE workflow_id = ? AND status IN ('pending', 'active'))",
                     (workflow_id, workflow_id))
    if any(busy) and not force:
        raise Invalid(f"workflow {workflow_id} is at work ({busy[0]} jobs pending or running, "
                      f"{busy[1]} allocations scheduled): cancel it first, or take --force")
    store.execute("UPDATE workflow SET is_canceled = 0, is_archived = 0,"
                  " has_detected_need_to_run_completion_script = 0 WHERE id = ?", (workflow_id,))
    settle(store, workflow_id, [row[0] for row in store.query(
        f"SELECT id FROM job WHERE workflow_id = ? AND status = {BLOCKED} AND unfinished = 0",
        (workflow_id,))])
    store_event(store, workflow_id, now, {
        "category": "user_action", "action": "reset_workflow_status", "user": user,
        "workflow_id": workflow_id, "force": force})
    store.news(workflow_id)


# ---- claims

class Capacity:
    """What is free for claimed jobs: values of one node, times `nodes`.

    A job of several nodes takes whole ones; single-node jobs share the rest, and only the sum is
    checked. None for cpus means that resources do not count.
    """

    def __init__(self, cpus, memory, gpus, nodes):
        self.node = (cpus, memory, gpus)
        self.nodes = max(nodes, 1)
        self.whole = 0
        self.shared = (0, 0, 0)

    def take(self, need, nodes):
        """Take (cpus, memory, gpus) on `nodes` nodes if they fit; says whether they did."""
        if nodes > 1:
            rest = self.nodes - self.whole - nodes
            if rest < 0 or any(used > one * rest for one, used in zip(self.node, self.shared)):
                return False
            self.whole += nodes
            return True
        rest = self.nodes - self.whole
        if any(used + want > one * rest
               for want, one, used in zip(need, self.node, self.shared)):
            return False
        self.shared = tuple(used + want for used, want in zip(self.shared, need))
        return True


class Bins:
    """What is free on each node of a runner of ours, packed as its Room does.

    free: [(cpus, memory_bytes, gpus), ...]; node: the same of a whole node.
    """

    def __init__(self, free, node):
        self.bins, self.node = [tuple(one) for one in free], tuple(node)

    def idle(self):
        """Indexes of nodes on which nothing runs."""
        return [index for index, one in enumerate(self.bins) if one == self.node]

    def most(self):
        """The most that a single-node job could take of each: (cpus, memory_bytes, gpus)."""
        return tuple(max(values) for values in zip(*self.bins))

    def take(self, need, nodes):
        """Take (cpus, memory, gpus) on `nodes` nodes if they fit; says whether they did."""
        if nodes > 1:
            idle = self.idle()
            for index in idle[:nodes] if len(idle) >= nodes else ():
                self.bins[index] = (0, 0, 0)
            return len(idle) >= nodes
        for index, one in enumerate(self.bins):
            if all(want <= have for want, have in zip(need, one)):
                self.bins[index] = tuple(have - want for want, have in zip(need, one))
                return True
        return False


def candidates(store, workflow_id, limit, fit="1", params=()):
    """Ready jobs in claim order as (id, requirement id, cpus, memory, gpus, nodes).

    fit: SQL condition on r (the requirement) and j (the job). Uses the index job_claim.
    """
    return store.query(
        "SELECT j.id, r.id, r.num_cpus, r.memory_bytes, r.num_gpus, r.num_nodes FROM job j"
        " CROSS JOIN resource_requirements r ON r.id = j.resource_requirements_id"
        f" WHERE j.workflow_id = ? AND j.status = {READY} AND j.compute_node_id IS NULL AND {fit}"
        " ORDER BY j.priority DESC, j.id LIMIT ?", (workflow_id, *params, limit))


def mark_pending(store, job_ids, node_id=None):
    """In a transaction: jobs are claimed, by a node if that is known."""
    store.execute(f"UPDATE job SET status = {PENDING}, compute_node_id = ? WHERE id IN {IDS}",
                  (node_id, compact(job_ids)))


def claim_next(store, workflow_id, limit):
    """In a transaction: claim ready jobs whatever they need; ids in claim order.

    Upstream: claim_next_jobs. Raises NotFound.
    """
    if workflow_row(store, workflow_id, "is_canceled")[0] or limit == 0:
        return []
    chosen = [row[0] for row in candidates(store, workflow_id, limit)]
    mark_pending(store, chosen)
    return chosen


def fit_condition(want):
    """SQL condition and parameters for a requirement and job that suit a node's request."""
    sql = ["r.num_cpus <= ?", "r.memory_bytes <= ?", "r.num_gpus <= ?", "r.num_nodes <= ?"]
    params = [want["num_cpus"], want["memory_bytes"], want["num_gpus"], want["num_nodes"]]
    if want.get("time_left_s") is not None:
        sql.append("r.runtime_s <= ?")
        params.append(want["time_left_s"])
    return " AND ".join(sql), params


def scheduler_condition(store, workflow_id, fit, params, scheduler_id, strict):
    """Narrow `fit` to jobs of this scheduler or of none; all jobs if there are none such, unless
    strict."""
    narrow = f"{fit} AND (j.scheduler_id IS NULL OR j.scheduler_id = ?)"
    narrow_params = [*params, scheduler_id]
    if strict or candidates(store, workflow_id, 1, narrow, narrow_params):
        return narrow, narrow_params
    return fit, params


def claim_by_resources(store, workflow_id, limit, want, strict):
    """In a transaction: claim the ready jobs that fit; ids in claim order.

    want: num_cpus, memory_bytes, num_gpus, num_nodes (free, per node), time_left_s,
    scheduler_config_id. The limit cuts the candidates before they are packed, as upstream does:
    claim_jobs_based_on_resources. Raises NotFound.
    """
    fit, params = scheduler_condition(store, workflow_id, *fit_condition(want),
                                      want.get("scheduler_config_id"), strict)
    capacity = Capacity(want["num_cpus"], want["memory_bytes"], want["num_gpus"], want["num_nodes"])
    if want["num_nodes"] < 1:
        return []
    chosen = [job_id for job_id, _, cpus, memory, gpus, nodes
              in candidates(store, workflow_id, limit, fit, params)
              if capacity.take((cpus, memory, gpus), nodes)]
    mark_pending(store, chosen)
    return chosen


def claim_for_runner(store, workflow_id, node_id, claim):
    """In a transaction: claim what fits now, round by round until nothing more does.

    claim: see runner_step. Returns (ids of jobs that fit, ids of prefetched ones).
    """
    limit = claim.get("limit", 0)
    chosen = []
    bins = Bins(claim["bins"], claim["whole"]) if claim.get("bins") else None
    while len(chosen) < limit:
        fit, params = "1", []
        if bins:
            enough = "r.num_cpus <= ? AND r.memory_bytes <= ? AND r.num_gpus <= ?"
            fit = f"CASE WHEN r.num_nodes > 1 THEN r.num_nodes <= ? AND {enough} ELSE {enough} END"
            params = [len(bins.idle()), *bins.node, *bins.most()]
        if claim.get("time_left_s") is not None:
            fit += " AND r.runtime_s <= ?"
            params.append(claim["time_left_s"])
        fit, params = scheduler_condition(
            store, workflow_id, fit, params, claim.get("scheduler_config_id"),
            claim.get("strict_scheduler_match", False))
        found = candidates(store, workflow_id, limit - len(chosen), fit, params)
        taken = [row[0] for row in found if not bins or bins.take(row[2:5], row[5])]
        if not taken:
            break
        mark_pending(store, taken, node_id)
        chosen += taken
        if not bins or len(taken) == len(found) < limit:
            break
    return chosen, prefetch(store, workflow_id, node_id, claim.get("prefetch"))


def prefetch(store, workflow_id, node_id, want):
    """In a transaction: claim a few jobs of one requirement, whatever is free; their ids."""
    if not want or want["limit"] < 1:
        return []
    chosen = [row[0] for row in candidates(store, workflow_id, min(want["limit"], 64),
                                           "r.id = ?", (want["resource_requirements_id"],))]
    mark_pending(store, chosen, node_id)
    return chosen


# ---- one conversation per runner

RESULT_COLUMNS = ("workflow_id", "job_id", "run_id", "attempt_id", "compute_node_id", "return_code",
                  "exec_time_minutes", "completion_time", "status", "peak_memory_bytes",
                  "avg_memory_bytes", "peak_cpu_percent", "avg_cpu_percent", "stderr_tail")


def store_result(store, values, replace=False):
    """In a transaction: insert a result (columns of RESULT_COLUMNS) and make it the latest."""
    verb = "INSERT OR REPLACE" if replace else "INSERT"
    result_id = store.insert(
        f"{verb} INTO result ({', '.join(RESULT_COLUMNS)}) VALUES"
        f" ({', '.join('?' * len(RESULT_COLUMNS))})", [values.get(name) for name in RESULT_COLUMNS])
    store.execute("INSERT OR REPLACE INTO latest_result VALUES (?, ?)",
                  (values["job_id"], result_id))
    return result_id


def take_completion(store, workflow_id, run_id, node_id, done):
    """In a transaction: apply one completion a runner reports; returns the ids made ready.

    run_id: the workflow's. Counts once: the same (job, run, attempt) again changes nothing, except
    that it replaces the -128 which stands for a runner believed dead. A completion of an attempt
    that the job has left behind (canceled, reset, taken over) is kept as a result and changes no
    status.
    """
    try:
        job = job_row(store, done["job_id"])
    except NotFound:
        return []                         # deleted meanwhile
    if job.workflow_id != workflow_id:
        return []
    values = {**done, "workflow_id": workflow_id, "compute_node_id": node_id,
              "status": STATUS_OF_NAME[done["status"]]}
    earlier = store.one("SELECT return_code FROM result WHERE job_id = ? AND run_id = ?"
                        " AND attempt_id = ?", (job.id, done["run_id"], done["attempt_id"]))
    mine = job.compute_node_id == node_id
    same = job.attempt_id == done["attempt_id"] and (not earlier or done["run_id"] == run_id)
    if mine and same and job.status in (PENDING, RUNNING):
        store_result(store, values, replace=bool(earlier))
        return apply_completion(store, job, values)
    if earlier and earlier[0] == ORPHAN_RETURN_CODE and done["return_code"] != ORPHAN_RETURN_CODE:
        store_result(store, values, replace=True)
        if same and job.status == FAILED and not job.compute_node_id:
            leave_complete(store, job, RUNNING)
            return apply_completion(store, job._replace(status=RUNNING), values)
    elif not earlier:
        latest = store.one("SELECT result_id FROM latest_result WHERE job_id = ?", (job.id,))
        store_result(store, values)
        if latest and not same:
            store.execute("UPDATE latest_result SET result_id = ? WHERE job_id = ?",
                          (latest[0], job.id))
    if mine and job.status not in (PENDING, RUNNING):   # else the node has its next attempt
        disown_job(store, job)
    return []


def apply_completion(store, job, values):
    """In a transaction: the job's status follows its completion; returns the ids made ready."""
    for file in values.get("output_files") or ():
        store.execute("UPDATE file SET st_mtime = ? WHERE id = ? AND workflow_id = ?",
                      (file["st_mtime"], file["id"], job.workflow_id))
    if values.get("requeue"):
        return requeue(store, job)
    return finish(store, job, values["status"], code=values["return_code"])


def requeue(store, job):
    """In a transaction: the job is ready again with the next attempt; returns its id in a list."""
    store.execute(f"UPDATE job SET status = {READY}, attempt_id = attempt_id + 1,"
                  " compute_node_id = NULL WHERE id = ?", (job.id,))
    count_triggers(store, job.workflow_id, "on_jobs_ready", [job.id])
    return [job.id]


def disown_job(store, job):
    """In a transaction: no process of the job is left, so it may be handed out again."""
    store.execute("UPDATE job SET compute_node_id = NULL WHERE id = ?", (job.id,))
    if job.status == READY:
        store.news(job.workflow_id)


def take_starts(store, workflow_id, node_id, starts, now):
    """In a transaction: claimed jobs of this node have begun to run."""
    for start in starts:
        if store.execute(
                f"UPDATE job SET status = {RUNNING}, started_ms = ? WHERE id = ? AND workflow_id ="
                f" ? AND attempt_id = ? AND compute_node_id = ? AND status = {PENDING}",
                (int(now * 1000), start["job_id"], workflow_id, start["attempt_id"], node_id)
                ) and store.is_heard(workflow_id):
            tell_started(store, start["job_id"])


def take_returns(store, workflow_id, node_id, returns):
    """In a transaction: claimed jobs that never started go back; returns their ids."""
    back = []
    for job in returns:
        if store.execute(f"UPDATE job SET status = {READY}, compute_node_id = NULL WHERE id = ?"
                         " AND workflow_id = ? AND attempt_id = ? AND compute_node_id = ?"
                         f" AND status = {PENDING}",
                         (job["job_id"], workflow_id, job["attempt_id"], node_id)):
            back.append(job["job_id"])
    return back


def compare_held(store, workflow_id, node_id, held):
    """In a transaction: what this node must stop, and which of its pending jobs it does not know.

    Returns (stop list of the answer, ids to hand out again). Jobs the node no longer has and that
    have left pending and running are free of it.
    """
    owned = {row[0]: JobRow(*row) for row in store.query(
        f"SELECT {', '.join(JobRow._fields)} FROM job WHERE compute_node_id = ?", (node_id,))}
    stop, known = [], set()
    for job_id, attempt_id in held:
        known.add(job_id)
        job = owned.get(job_id)
        if not job or job.attempt_id != attempt_id or job.status not in (PENDING, RUNNING):
            row = store.one("SELECT status FROM job WHERE id = ?", (job_id,))
            stop.append({"job_id": job_id, "attempt_id": attempt_id,
                         "status": STATUS_NAMES[row[0]] if row else "deleted"})
    lost = [job.id for job in owned.values() if job.id not in known and job.status == PENDING]
    for job in owned.values():
        if job.id not in known and job.status not in (PENDING, RUNNING):
            disown_job(store, job)
    return stop, lost


def claimed_jobs(store, job_ids, run_id, prefetched=()):
    """Claimed jobs as the runner needs them, in the order of `job_ids`, and their requirements."""
    names = ("id", "workflow_id", "name", "command", "invocation_script",
             "resource_requirements_id", "failure_handler_id", "attempt_id", "priority", "stdio")
    text = compact(job_ids)
    rows = {row[0]: row for row in store.query(
        f"SELECT {', '.join(names)} FROM job WHERE id IN {IDS}", (text,))}
    jobs = [{name: value for name, value in zip(names, rows[job_id]) if value is not None}
            for job_id in job_ids]
    by_id = {job["id"]: job for job in jobs}
    for job in jobs:
        job["run_id"] = run_id
        if job["id"] in prefetched:
            job["prefetched"] = True
    for job_id, file_id, path in store.query(
            "SELECT o.job_id, f.id, f.path FROM job_output_file o JOIN file f ON f.id = o.file_id"
            f" WHERE o.job_id IN {IDS} ORDER BY f.id", (text,)):
        by_id[job_id].setdefault("output_files", []).append({"id": file_id, "path": path})
    kind = KINDS["resource_requirements"]
    wanted = compact(sorted({job["resource_requirements_id"] for job in jobs}))
    requirements = store.query(
        f"SELECT {', '.join(field.name for field in kind.fields)} FROM resource_requirements"
        f" WHERE id IN {IDS}", (wanted,))
    return jobs, {str(row[0]): to_record(kind.fields, row) for row in requirements}


def runner_step(store, workflow_id, step, now):
    """In a transaction: take what a runner reports and give it work; never waits.

    step: compute_node_id, step number, starts, completions, returns, held, claim, counts, closing,
    replay. A repeated step (its answer was lost) counts nothing twice and claims nothing new, but
    hands out again what is assigned to the node and not in `held`. A step older than the last one
    changes nothing. Raises NotFound.
    """
    run_id, canceled, minutes = workflow_row(
        store, workflow_id, "run_id, is_canceled, compute_node_wait_for_healthy_database_minutes")
    node_id, number = step["compute_node_id"], step.get("step", 0)
    node = store.one("SELECT is_active, beats FROM compute_node WHERE id = ? AND workflow_id = ?",
                     (node_id, workflow_id))
    if not node:
        raise not_found(KINDS["compute_node"], node_id)
    replay = bool(step.get("replay"))
    last = store.heard.get(node_id, (0, 0))[1]
    answer = {"jobs": [], "requirements": {}, "stop": [], "run_id": run_id}
    if not replay and number < last:
        return {**answer, **situation(store, workflow_id), "lease_s": lease_s(minutes)}
    if not replay:
        store.heard[node_id] = (time.monotonic(), number)
        if node != (1, 1):
            store.execute("UPDATE compute_node SET is_active = 1, beats = 1 WHERE id = ?",
                          (node_id,))
    freed = []
    take_starts(store, workflow_id, node_id, step.get("starts") or (), now)
    for done in step.get("completions") or ():
        freed += take_completion(store, workflow_id, run_id, node_id, done)
    if replay or number != last:
        freed += take_returns(store, workflow_id, node_id, step.get("returns") or ())
    if not replay:
        answer["stop"], lost = compare_held(store, workflow_id, node_id, step.get("held") or ())
        claim = step.get("claim")
        chosen, extra = lost, []
        if claim and not canceled and number != last:
            claimed, extra = claim_for_runner(store, workflow_id, node_id, claim)
            chosen = lost + claimed
        if chosen or extra:
            answer["jobs"], answer["requirements"] = claimed_jobs(
                store, chosen + extra, run_id, extra)
    if step.get("completions"):
        check_end(store, workflow_id)
    if step.get("closing"):
        close_node(store, node_id, now)
    answer.update(situation(store, workflow_id))
    if freed and answer["has_ready"] or step.get("closing"):
        store.news(workflow_id)           # others may want what this runner left
        answer.update(situation(store, workflow_id))
    answer["lease_s"] = lease_s(minutes)
    if step.get("counts"):
        answer["counts"] = counts(store, workflow_id)
    return answer


def lease_s(minutes):
    """How long a runner may be silent before it counts as dead."""
    return minutes * 60 + LEASE_MARGIN_S


def situation(store, workflow_id):
    """What a waiting client wants to know of a workflow. Raises NotFound."""
    generation, canceled = workflow_row(store, workflow_id, "generation, is_canceled")
    ready, pending = store.one(
        f"SELECT EXISTS (SELECT 1 FROM job WHERE workflow_id = ? AND status = {READY}"
        " AND compute_node_id IS NULL), EXISTS (SELECT 1 FROM workflow_action WHERE"
        " workflow_id = ? AND trigger_count >= required_triggers AND executed = 0)",
        (workflow_id, workflow_id))
    return {"generation": generation, "has_ready": bool(ready), "is_canceled": bool(canceled),
            "is_complete": is_complete(store, workflow_id), "pending_actions": bool(pending)}


# ---- nodes that die

def close_node(store, node_id, now):
    """In a transaction: the node's runner has ended; whatever it owned is nobody's."""
    if store.execute("UPDATE compute_node SET is_active = 0, duration_seconds = ?"
                     " - strftime('%s', start_time) WHERE id = ? AND is_active = 1",
                     (round(now, 3), node_id)):
        tell_node(store, node_id, started=False)
    store.execute(f"UPDATE job SET compute_node_id = NULL WHERE compute_node_id = ? AND status"
                  f" NOT IN ({PENDING}, {RUNNING})", (node_id,))
    store.heard.pop(node_id, None)


def orphan_result(job, run_id, node_id, now):
    """The result that stands for an attempt whose runner died."""
    return {"workflow_id": job.workflow_id, "job_id": job.id, "run_id": run_id,
            "attempt_id": job.attempt_id, "compute_node_id": node_id,
            "return_code": ORPHAN_RETURN_CODE, "exec_time_minutes": 0.0,
            "completion_time": iso_time(now), "status": FAILED,
            "stderr_tail": f"torc: the runner on compute node {node_id} died"}


def release_node(store, node_id, now, ended=None, reason=""):
    """In a transaction: a node's runner is proven dead, so its jobs are ready again.

    Running ones keep a result (-128) of the attempt that was lost; the next attempt has the next
    number. ended: (status, return code) that running jobs get instead, where it is known what
    ended them. reason: for the tail of their stderr. Returns (requeued ids, number of others).
    Raises NotFound.
    """
    row = store.one("SELECT workflow_id FROM compute_node WHERE id = ?", (node_id,))
    if not row:
        raise not_found(KINDS["compute_node"], node_id)
    run_id = workflow_row(store, row[0], "run_id")[0]
    requeued, others = [], 0
    for job in owned_jobs(store, node_id):
        if job.status == RUNNING:
            values = orphan_result(job, run_id, node_id, now)
            if ended:
                values.update(status=ended[0], return_code=ended[1])
            if reason:
                values["stderr_tail"] = f"torc: {reason}"
            store_result(store, values, replace=True)
        if job.status == RUNNING and ended:
            finish(store, job, ended[0], code=ended[1])
            others += 1
        elif job.status in (PENDING, RUNNING):
            requeued += requeue(store, job)
        else:
            others += 1
    close_node(store, node_id, now)
    check_end(store, row[0])
    store.news(row[0])
    return requeued, others


def owned_jobs(store, node_id):
    """Jobs of which the node may have a process."""
    return [JobRow(*values) for values in store.query(
        f"SELECT {', '.join(JobRow._fields)} FROM job WHERE compute_node_id = ? ORDER BY id",
        (node_id,))]


def expire_node(store, node_id, now):
    """In a transaction: a node's lease ran out. Its running jobs fail with -128, its pending ones
    are ready again with the next attempt."""
    row = store.one("SELECT workflow_id FROM compute_node WHERE id = ? AND is_active = 1",
                    (node_id,))
    if not row:
        return
    run_id = workflow_row(store, row[0], "run_id")[0]
    for job in owned_jobs(store, node_id):
        if job.status == RUNNING:
            store_result(store, orphan_result(job, run_id, node_id, now), replace=True)
            finish(store, job, FAILED, code=ORPHAN_RETURN_CODE)
        elif job.status == PENDING:
            requeue(store, job)
    close_node(store, node_id, now)
    check_end(store, row[0])
    store.news(row[0])


def expired_nodes(store, now, started):
    """Ids of nodes whose lease has run out, and the seconds until the next one could.

    now: time.monotonic(); started: when this server began, which begins all leases anew.
    """
    expired, wait = [], 600.0
    for node_id, minutes in store.query(
            "SELECT n.id, w.compute_node_wait_for_healthy_database_minutes FROM compute_node n"
            " JOIN workflow w ON w.id = n.workflow_id WHERE n.is_active = 1 AND n.beats = 1"):
        left = store.heard.get(node_id, (started, 0))[0] + lease_s(minutes) - now
        if left <= 0:
            expired.append(node_id)
        else:
            wait = min(wait, left)
    return expired, wait


# ---- single jobs

def complete_job(store, job_id, status, run_id, body):
    """In a transaction: upstream's complete_job. Returns the result's id.

    Raises NotFound, Invalid (already complete; the body names another job), Internal (status not
    terminal, wrong run, duplicate result, job disabled or pending_failed).
    """
    job = job_row(store, job_id)
    if status not in FINAL_SET:
        raise Internal(f"status {STATUS_NAMES[status]} does not complete a job")
    if job.status in COMPLETE_SET:
        if not (job.status == CANCELED and job.cascaded):
            raise Invalid(f"job {job_id} is already complete ({STATUS_NAMES[job.status]})")
    if body["job_id"] != job_id or body["workflow_id"] != job.workflow_id:
        raise Invalid(f"the result is for job {body['job_id']} of workflow {body['workflow_id']}, "
                      f"not for job {job_id} of workflow {job.workflow_id}")
    current = workflow_row(store, job.workflow_id, "run_id")[0]
    if run_id != current:
        raise Internal(f"run_id {run_id} is not the workflow's, which is {current}")
    if job.status in (DISABLED, PENDING_FAILED):
        raise Internal(f"job {job_id} is {STATUS_NAMES[job.status]}")
    result_id = store_result(store, {**body, "attempt_id": body.get("attempt_id") or 1,
                                     "status": STATUS_OF_NAME[body["status"]]})
    if job.status == CANCELED:            # only the cascade had canceled it
        leave_complete(store, job, BLOCKED)
    if finish(store, job, status, code=body["return_code"]):
        store.news(job.workflow_id)
    check_end(store, job.workflow_id)
    return result_id


def start_job(store, job_id, run_id, node_id, now):
    """In a transaction: pending to running. Raises NotFound, Internal, Invalid."""
    job = job_row(store, job_id)
    if job.status != PENDING:
        raise Internal(f"job {job_id} is {STATUS_NAMES[job.status]}, not pending")
    check_run(store, job.workflow_id, run_id)
    store.execute(f"UPDATE job SET status = {RUNNING}, started_ms = ?, compute_node_id = (SELECT id"
                  " FROM compute_node WHERE id = ?) WHERE id = ?",
                  (int(now * 1000), node_id, job_id))
    if store.is_heard(job.workflow_id):
        tell_started(store, job_id)


def check_run(store, workflow_id, run_id):
    """Raise Invalid unless run_id is the workflow's."""
    current = workflow_row(store, workflow_id, "run_id")[0]
    if run_id != current:
        raise Invalid(f"run_id {run_id} is not the workflow's, which is {current}")


def manage_status(store, job_id, status, run_id):
    """In a transaction: set a status outside the complete set. Upstream: manage_status_change.

    Raises Invalid, NotFound. From the complete set to uninitialized takes direct dependents that
    are completed or failed along.
    """
    if status in COMPLETE_SET:
        raise Invalid(f"status {STATUS_NAMES[status]} is set by complete_job only")
    job = job_row(store, job_id)
    if status == job.status:
        return
    check_run(store, job.workflow_id, run_id)
    leave_complete(store, job, status)
    if job.status in COMPLETE_SET and status == UNINITIALIZED:
        for dependent in store.query(
                "SELECT j.id FROM job_dependency d JOIN job j ON j.id = d.job_id WHERE"
                f" d.depends_on_job_id = ? AND j.status IN ({COMPLETED}, {FAILED})", (job_id,)):
            leave_complete(store, job_row(store, dependent[0]), UNINITIALIZED)
    disown(store, job.workflow_id)
    store.news(job.workflow_id)


def retry_job(store, job_id, run_id, max_retries, now):
    """In a transaction: ready again with the next attempt. Upstream: retry_job.

    The runner calls it while the job is running. Raises NotFound, Invalid.
    """
    job = job_row(store, job_id)
    check_run(store, job.workflow_id, run_id)
    if job.status not in (RUNNING, FAILED, TERMINATED):
        raise Invalid(f"job {job_id} is {STATUS_NAMES[job.status]}: only running, failed and "
                      "terminated jobs can be retried")
    if job.attempt_id >= max_retries:
        raise Invalid(f"job {job_id} has had {job.attempt_id} attempts of {max_retries}")
    leave_complete(store, job, READY)
    requeue(store, job)
    store_event(store, job.workflow_id, now, {
        "event_type": "job_retried", "job_id": job_id, "job_name": job.name, "run_id": run_id,
        "previous_attempt": job.attempt_id, "new_attempt": job.attempt_id + 1,
        "message": f"job {job.name} is retried"})
    store.news(job.workflow_id)


def stop_job(store, job_id, status):
    """In a transaction: cancel or terminate a job; its runner is told to end the process.

    Its dependents follow the rules of settle. Raises NotFound, Invalid when it has ended already.
    """
    job = job_row(store, job_id)
    if status not in (CANCELED, TERMINATED):
        raise Invalid(f"a job is stopped as canceled or terminated, not as {STATUS_NAMES[status]}")
    if job.status in COMPLETE_SET:
        raise Invalid(f"job {job_id} has already ended ({STATUS_NAMES[job.status]})")
    started = job.status in (PENDING, RUNNING)
    store.execute("DELETE FROM latest_result WHERE job_id = ?", (job_id,))
    finish(store, job, status, node=job.compute_node_id if started else None)
    disown(store, job.workflow_id)
    check_end(store, job.workflow_id)
    store.news(job.workflow_id)


def rerun_job(store, job_id):
    """In a transaction: an ended job is ready (or blocked) again with the next attempt.

    What its failure had canceled is blocked again. Raises NotFound, Invalid.
    """
    job = job_row(store, job_id)
    if job.status not in (*COMPLETE_SET, PENDING_FAILED):
        raise Invalid(f"job {job_id} is {STATUS_NAMES[job.status]}: only a job that has ended can "
                      "be retried")
    canceled = workflow_row(store, job.workflow_id, "is_canceled")[0]
    if canceled:
        raise Invalid(f"workflow {job.workflow_id} is canceled: torc workflows reset-status "
                      f"{job.workflow_id} --failed-only --reinitialize starts it again")
    unfinished = store.one("SELECT unfinished FROM job WHERE id = ?", (job_id,))[0]
    status = BLOCKED if unfinished else READY
    leave_complete(store, job, status)
    store.execute("UPDATE job SET attempt_id = attempt_id + 1 WHERE id = ?", (job_id,))
    store.execute("DELETE FROM latest_result WHERE job_id = ?", (job_id,))
    if status == READY:
        count_triggers(store, job.workflow_id, "on_jobs_ready", [job_id])
    store.news(job.workflow_id)


# ---- actions

def count_triggers(store, workflow_id, trigger, job_ids):
    """In a transaction: jobs became ready or complete; count that for actions that list them."""
    raised = store.query(
        "SELECT a.id, count(*) FROM action_job x JOIN workflow_action a ON a.id = x.action_id"
        f" WHERE x.job_id IN {IDS} AND a.trigger_type = ? AND a.trigger_count < a.required_triggers"
        " GROUP BY a.id", (compact(job_ids), trigger))
    for action_id, number in raised:
        store.execute("UPDATE workflow_action SET trigger_count ="
                      " min(required_triggers, trigger_count + ?) WHERE id = ?",
                      (number, action_id))
    if raised:
        store.news(workflow_id)


def reset_actions(store, workflow_id):
    """In a transaction, at initialization: recovery actions go, others begin anew."""
    store.execute("DELETE FROM workflow_action WHERE workflow_id = ? AND is_recovery = 1",
                  (workflow_id,))
    store.execute(
        "UPDATE workflow_action SET executed = 0, executed_by = NULL, trigger_count = CASE"
        " WHEN trigger_type IN ('on_workflow_start', 'on_worker_start', 'on_worker_complete')"
        " THEN required_triggers"
        " WHEN trigger_type IN ('on_jobs_ready', 'on_jobs_complete') THEN (SELECT count(*)"
        " FROM action_job x JOIN job j ON j.id = x.job_id WHERE x.action_id = workflow_action.id"
        f" AND (j.status IN {COMPLETE} OR (j.status = {READY} AND trigger_type = 'on_jobs_ready')))"
        " ELSE 0 END WHERE workflow_id = ?", (workflow_id,))


def add_action(store, workflow_id, action):
    """In a transaction: insert an action from a checked body; returns its id."""
    job_ids = action.get("job_ids")
    job_trigger = action["trigger_type"] in ("on_jobs_ready", "on_jobs_complete")
    action_id = store.insert(
        "INSERT INTO workflow_action (workflow_id, trigger_type, action_type, action_config,"
        " job_ids, trigger_count, required_triggers, executed, persistent, is_recovery)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (workflow_id, action["trigger_type"], action["action_type"],
         compact(action["action_config"]), None if job_ids is None else compact(job_ids),
         action.get("trigger_count") or 0,
         len(set(job_ids)) if job_trigger and job_ids is not None else 1,
         bool(action.get("executed")), bool(action.get("persistent")),
         bool(action.get("is_recovery"))))
    store.insert_many("INSERT INTO action_job (job_id, action_id)", 2,
                      [(job_id, action_id) for job_id in sorted(set(job_ids or ()))])
    return action_id


def actions(store, workflow_id, pending=False, triggers=()):
    """Actions of a workflow by id; pending: triggered and not executed yet."""
    names = ("id", "workflow_id", "trigger_type", "action_type", "action_config", "job_ids",
             "trigger_count", "required_triggers", "executed", "executed_at", "executed_by",
             "persistent", "is_recovery")
    condition = "trigger_count >= required_triggers AND executed = 0" if pending else "1"
    records = []
    for row in store.query(f"SELECT {', '.join(names)} FROM workflow_action WHERE workflow_id = ?"
                           f" AND {condition} ORDER BY id", (workflow_id,)):
        record = {name: value for name, value in zip(names, row) if value is not None}
        for name in ("executed", "persistent", "is_recovery"):
            record[name] = bool(record[name])
        for name in ("action_config", "job_ids"):
            if name in record:
                record[name] = json.loads(record[name])
        if not triggers or record["trigger_type"] in triggers:
            records.append(record)
    return records


def claim_action(store, workflow_id, action_id, node_id, now):
    """In a transaction: take an action. Raises NotFound, Conflict when another has it."""
    row = store.one("SELECT executed, persistent FROM workflow_action WHERE id = ?"
                    " AND workflow_id = ?", (action_id, workflow_id))
    if not row:
        raise NotFound(f"Workflow action not found with ID: {action_id}")
    if row[0] and not row[1]:
        raise Conflict(f"action {action_id} has been claimed by another compute node")
    store.execute("UPDATE workflow_action SET executed = ?, executed_at = ?, executed_by = ?"
                  " WHERE id = ?", (not row[1], iso_time(now), node_id, action_id))


def unclaim_action(store, workflow_id, action_id):
    """In a transaction: whoever took an action could not carry it out. Raises NotFound."""
    if not store.execute("UPDATE workflow_action SET executed = 0, executed_at = NULL,"
                         " executed_by = NULL WHERE id = ? AND workflow_id = ?",
                         (action_id, workflow_id)):
        raise NotFound(f"Workflow action not found with ID: {action_id}")
    store.news(workflow_id)


# ---- explaining

def unfinished(store, workflow_id):
    """What keeps a workflow from completing: see the API's GET /workflows/{id}/unfinished."""
    by_status = {name: number for name, number in counts(store, workflow_id).items()
                 if name in STATUS_OF_NAME and number
                 and STATUS_OF_NAME[name] not in (*COMPLETE_SET, DISABLED)}
    kind = KINDS["resource_requirements"]
    ready = []
    for row in store.query(
            "SELECT resource_requirements_id, count(*), min(id), sum(compute_node_id IS NOT NULL)"
            f" FROM job WHERE workflow_id = ? AND status = {READY} GROUP BY 1 ORDER BY 3",
            (workflow_id,)):
        ready.append({"resource_requirements": fetch(store, kind, row[0]), "count": row[1],
                      "job_id": row[2], "job_name": job_row(store, row[2]).name,
                      "stopping": row[3]})
    nodes = listing(store, KINDS["compute_node"], Page(), "workflow_id = ? AND is_active = 1",
                    (workflow_id,))["items"]
    scheduled = store.one("SELECT count(*) FROM scheduled_compute_node WHERE workflow_id = ?"
                          " AND status IN ('pending', 'active')", (workflow_id,))[0]
    return {"by_status": by_status, "ready": ready, "waiting": waiting_for(store, workflow_id),
            "active_nodes": nodes, "scheduled": scheduled}


def waiting_for(store, workflow_id):
    """At most 20 jobs that will not end by themselves, and so hold the workflow up."""
    roots = store.query(
        "SELECT j.id, j.name, j.status, (SELECT count(*) FROM job_dependency d WHERE"
        " d.depends_on_job_id = j.id) AS dependents FROM job j WHERE j.workflow_id = ? AND"
        f" (j.status IN ({UNINITIALIZED}, {PENDING_FAILED}) OR (j.status = {DISABLED}"
        " AND EXISTS (SELECT 1 FROM job_dependency d JOIN job b ON b.id = d.job_id WHERE"
        f" d.depends_on_job_id = j.id AND b.status = {BLOCKED}))) ORDER BY dependents DESC, j.id"
        " LIMIT 20", (workflow_id,))
    if not roots:                         # nothing else to wait for: blocked jobs form a circle
        roots = store.query(
            "SELECT j.id, j.name, j.status, (SELECT count(*) FROM job_dependency d WHERE"
            " d.depends_on_job_id = j.id) FROM job j WHERE j.workflow_id = ?"
            f" AND j.status = {BLOCKED} AND NOT EXISTS (SELECT 1 FROM job WHERE workflow_id = ?"
            " AND status IN"
            f" ({READY}, {PENDING}, {RUNNING})) ORDER BY j.id LIMIT 20", (workflow_id, workflow_id))
    return [{"job_id": job_id, "job_name": name, "status": STATUS_NAMES[status],
             "dependents": dependents} for job_id, name, status, dependents in roots]


def why(store, job_id):
    """One sentence: why a job is not running, or how it ended. Raises NotFound."""
    job = job_row(store, job_id)
    canceled = workflow_row(store, job.workflow_id, "is_canceled")[0]
    result = store.one(
        "SELECT r.return_code, r.completion_time, r.compute_node_id, r.attempt_id, r.run_id,"
        " r.stderr_tail FROM latest_result l JOIN result r ON r.id = l.result_id"
        " WHERE l.job_id = ?", (job_id,))
    if job.status == BLOCKED:
        return why_blocked(store, job)
    if job.status == READY:
        return why_ready(store, job, canceled)
    if job.status in (FAILED, TERMINATED, COMPLETED, PENDING_FAILED) and result:
        code, when, node_id, attempt, run, tail = result
        last = (tail or "").strip().splitlines()[-1:]
        return (f"it {STATUS_NAMES[job.status].replace('_', ' ')} with {code_meaning(code)} on "
                f"{node_name(store, node_id)} at {when} (run {run}, attempt {attempt})"
                + (f": {last[0]}" if last else ""))
    if job.status == CANCELED and job.cascaded:
        return f"it was canceled because {bad_dependency(store, job_id)}"
    return {
        UNINITIALIZED: f"it is not initialized: torc workflows reinit {job.workflow_id} starts "
                       "what is new or has changed",
        PENDING: f"it is claimed by {node_name(store, job.compute_node_id)}, which is about to "
                 "start it",
        RUNNING: f"it is running on {node_name(store, job.compute_node_id)} (attempt "
                 f"{job.attempt_id})",
        CANCELED: "it was canceled by a user"
                  + (", as was the whole workflow" if canceled else ""),
        DISABLED: "it is disabled, so it never runs and what depends on it waits for ever",
    }.get(job.status, f"it is {STATUS_NAMES[job.status]}; no result is kept")


def why_blocked(store, job):
    """What a blocked job waits for."""
    rows = store.query(
        "SELECT p.id, p.name, p.status FROM job_dependency d JOIN job p ON p.id ="
        f" d.depends_on_job_id WHERE d.job_id = ? AND p.status NOT IN {COMPLETE} ORDER BY"
        f" p.status IN ({DISABLED}, {PENDING_FAILED}) DESC, p.id LIMIT 4", (job.id,))
    total = store.one("SELECT unfinished FROM job WHERE id = ?", (job.id,))[0]
    names = ", ".join(f'"{name}" (job {job_id}, {STATUS_NAMES[status]})'
                      for job_id, name, status in rows[:3])
    more = f" and {total - 3} more" if total > 3 else ""
    return f"it waits for {names}{more}" if rows else "it is blocked, though it waits for no job"


def misfits(need, cpus, memory_bytes, gpus, nodes):
    """What of a requirement (a record) a machine does not have, as phrases."""
    pairs = ((need["num_cpus"], cpus, "CPU"), (need["num_gpus"], gpus, "GPU"),
             (need["num_nodes"], nodes, "node"))
    found = [f"{plural(want, word)} (it has {have})" for want, have, word in pairs if want > have]
    if parse_memory(need["memory"]) > memory_bytes:
        found.append(f"{need['memory']} of memory (it has {format_bytes(memory_bytes)})")
    return found


def why_ready(store, job, canceled):
    """Why a ready job is not running."""
    if canceled:
        return (f"workflow {job.workflow_id} is canceled: torc workflows reset-status "
                f"{job.workflow_id} lifts that")
    if job.compute_node_id:
        return (f"an earlier attempt is still being stopped on "
                f"{node_name(store, job.compute_node_id)}")
    need = fetch(store, KINDS["resource_requirements"], store.one(
        "SELECT resource_requirements_id FROM job WHERE id = ?", (job.id,))[0])
    nodes = store.query("SELECT hostname, num_cpus, memory_gb, num_gpus, num_nodes, is_active"
                        " FROM compute_node WHERE workflow_id = ? ORDER BY is_active DESC, id DESC"
                        " LIMIT 1000", (job.workflow_id,))
    active = [row for row in nodes if row[5]]
    lacks = [misfits(need, cpus, memory * 2**30, gpus, count)
             for _, cpus, memory, gpus, count, _ in active or nodes[:1]]
    too_small = "" if not all(lacks) or not lacks else (
        f'needs {" and ".join(lacks[0])} (resource requirements "{need["name"]}")')
    waiting = store.one("SELECT count(*) FROM scheduled_compute_node WHERE workflow_id = ? AND"
                        " status = 'pending'", (job.workflow_id,))[0]
    if not active and waiting:
        return f"it is ready and waits for {plural(waiting, 'allocation')} of Slurm to begin"
    if not active:
        start = f"no runner is at work on workflow {job.workflow_id}: torc run {job.workflow_id}"
        return f"it {too_small.replace('it has', f'the last runner, on {nodes[0][0]}, had')}; " \
            f"{start} on a larger machine" if too_small else f"it is ready, but {start}"
    if too_small:
        return f"it {too_small.replace('it has', f'the runner on {active[0][0]} has')}" + (
            f", and so do the other {len(active) - 1} runners" if len(active) > 1 else "")
    ahead = store.one(f"SELECT count(*) FROM job j, job me WHERE me.id = ? AND j.workflow_id ="
                      f" me.workflow_id AND j.status = {READY} AND (j.priority > me.priority OR"
                      " (j.priority = me.priority AND j.id < me.id))", (job.id,))[0]
    return f"it is ready and waits for a free place; {ahead} jobs are ahead of it"


def bad_dependency(store, job_id):
    """Which failure, upstream of a canceled job, canceled it."""
    row = store.one(
        "WITH RECURSIVE above (id) AS (SELECT depends_on_job_id FROM job_dependency"
        " WHERE job_id = ? UNION SELECT d.depends_on_job_id FROM above JOIN job a"
        " ON a.id = above.id JOIN"
        f" job_dependency d ON d.job_id = a.id WHERE a.status = {CANCELED} AND a.cascaded = 1)"
        " SELECT j.id, j.name, j.status FROM above JOIN job j ON j.id = above.id WHERE"
        f" j.status IN ({FAILED}, {TERMINATED}) OR (j.status = {CANCELED} AND j.cascaded = 0)"
        " ORDER BY j.id LIMIT 1", (job_id,))
    if not row:
        return "a job it depends on ended badly"
    return f'"{row[1]}" (job {row[0]}), on which it depends, {STATUS_PAST[row[2]]}'


STATUS_PAST = {FAILED: "failed", CANCELED: "was canceled", TERMINATED: "was terminated"}


def node_name(store, node_id):
    """A compute node for people: "c1 (pid 4242)"."""
    row = store.one("SELECT hostname, pid FROM compute_node WHERE id = ?", (node_id,))
    return f"{row[0]} (pid {row[1]})" if row else "an unknown compute node"


def code_meaning(code):
    """A return code for people."""
    import signal
    if code == ORPHAN_RETURN_CODE:
        return "return code -128 (its runner died)"
    known = {126: "command cannot be executed", 127: "command not found", 137: "killed, SIGKILL",
             152: "time limit"}
    text = known.get(code)
    if not text and 128 < code < 193:
        with contextlib.suppress(ValueError):
            text = signal.Signals(code - 128).name
    return f"return code {code}" + (f" ({text})" if text else "")


# ---- what the views of a workflow show
#
# Numbers for a page that is drawn again every second, also of 100,000 jobs. What is dear and seldom
# changes is kept in memory (store.kept): which families there are, and the attempts that ended.

FEW_JOBS = 400                            # up to here a graph shows each job, else families
MOST_FAMILIES = 60
KEPT_AT_MOST = 8
MS = "round((julianday({0}) - 2440587.5) * 86400000)"           # a text's time, ms since the epoch
DONE_SET = (*COMPLETE_SET, DISABLED)


def span(seconds):
    """A duration for people: "3m 20s"."""
    return re.sub(r"(?<=[a-z])(?=\d)", " ", format_duration(seconds))


def plain_names(names, most=3):
    """Names as a list in a sentence: "a, b and 4 more"."""
    names = list(names)
    if len(names) > most:
        names = [*names[:most - 1], f"{len(names) - most + 1:,} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def keep(store, key, value):
    """Remember what was worked out; the oldest of KEPT_AT_MOST goes."""
    with store.keeping:
        store.kept.pop(key, None)
        while len(store.kept) >= KEPT_AT_MOST:
            store.kept.pop(next(iter(store.kept)))
        store.kept[key] = value
    return value


def json_columns(store, names, source, params):
    """Columns of a SELECT, each as one JSON list: see Store.bulk."""
    lists = ", ".join(f"json_group_array({name})" for name in names)
    return [json.loads(text) for text in store.one(f"SELECT {lists} {source}", params)]


class Shape(NamedTuple):
    """The families of a workflow's jobs, and which waits for which."""

    number: int                           # workflow.shape for which this is true
    names: list                           # of families, in the order of their first jobs
    sizes: list
    labels: list                          # "align_*", or the name of an only member
    family_of: dict                       # job id: index of its family
    edges: dict                           # (index, index of what waits for it): dependencies
    chained: set                          # families of which some wait for others


def family_name(name):
    """The family of a job: its name without the numbers at its end."""
    return name.rstrip("0123456789_-.") or "#"


def family_names(names):
    """The family of each name; coarser ones if there would be more than MOST_FAMILIES."""
    found = []
    for stem in (family_name, lambda name: re.match(r"[^\W\d_]*", name)[0] or "#", lambda _: "#"):
        found = [stem(name) for name in names]
        if len(set(found)) <= MOST_FAMILIES:
            break
    return found


def shape_of(store, workflow_id):
    """The Shape of a workflow, worked out anew when jobs or dependencies have come or gone."""
    from collections import Counter
    number = workflow_row(store, workflow_id, "shape")[0]
    known = store.kept.get(("shape", workflow_id))
    if known and known.number == number:
        return known
    ids, names = json_columns(store, ("id", "name"), "FROM job WHERE workflow_id = ?",
                              (workflow_id,))
    found = family_names(names)
    index = {name: place for place, name in enumerate(dict.fromkeys(found))}
    family_of = dict(zip(ids, map(index.__getitem__, found)))
    first = dict(zip(reversed(found), reversed(names)))
    sizes = [number for _, number in sorted(Counter(family_of.values()).items())]
    # Ids without a gap are a range of the table's key, which needs no look at the jobs.
    whole = ids and max(ids) - min(ids) + 1 == len(ids)
    source, params = ("FROM job_dependency d WHERE d.job_id BETWEEN ? AND ?",
                      (min(ids), max(ids))) if whole else (
        "FROM job j CROSS JOIN job_dependency d ON d.job_id = j.id WHERE j.workflow_id = ?",
        (workflow_id,))
    after, before = json_columns(store, ("d.job_id", "d.depends_on_job_id"), source, params)
    edges = Counter(zip(map(family_of.get, before), map(family_of.get, after)))
    labels = [first[name] if size == 1 else "*" if name == "#" else f"{name}_*"
              for name, size in zip(index, sizes)]
    return keep(store, ("shape", workflow_id), Shape(
        number, list(index), sizes, labels, family_of, dict(edges),
        {one for one, other in edges if one == other}))


def family_members(store, workflow_id, name):
    """Ids of the jobs of a family."""
    shape = shape_of(store, workflow_id)
    wanted = shape.names.index(name) if name in shape.names else -1
    return [job_id for job_id, family in shape.family_of.items() if family == wanted]


def family_counts(store, workflow_id, shape):
    """For each family {status name: jobs}."""
    from collections import Counter
    answer = [{} for _ in shape.names]
    for status, ids in store.query("SELECT status, json_group_array(id) FROM job WHERE"
                                   " workflow_id = ? GROUP BY status", (workflow_id,)):
        families = Counter(map(shape.family_of.get, json.loads(ids)))
        for family, number in families.items():
            if family is not None:        # else a job that came a moment ago
                answer[family][STATUS_NAMES[status]] = number
    return answer


class Integral:
    """The sum of weighted stretches of time, of which any part can be had without going through
    them: starts, ends (ms) and weights as lists."""

    def __init__(self, starts, ends, weights):
        self.base = min(starts, default=0)           # keeps the sums small, so exact enough
        self.sides = []
        for times in (starts, ends):
            pairs = sorted(zip(times, weights))
            base = self.base
            self.sides.append((
                [pair[0] for pair in pairs],
                [0, *itertools.accumulate([float(pair[1]) for pair in pairs])],
                [0, *itertools.accumulate([(time_ms - base) * float(weight)
                                           for time_ms, weight in pairs])]))

    def until(self, moment):
        """Weight times milliseconds up to a moment."""
        from bisect import bisect_left
        total, sign = 0.0, 1
        for times, weights, products in self.sides:
            place = bisect_left(times, moment)
            total += sign * (weights[place] * (moment - self.base) - products[place])
            sign = -1
        return total

    def means(self, begin, end, bins):
        """The mean weight in each of so many bins."""
        width = (end - begin) / bins
        sums = [self.until(begin + number * width) for number in range(bins + 1)]
        return [max(0.0, after - before) / width for before, after in zip(sums, sums[1:])]


class Lane:
    """What ended on one runner. bars: [(start, end, job id, status, requirement id), ...] by start,
    times in ms; needs: {requirement id: CPUs}."""

    def __init__(self, bars, needs):
        self.bars = bars
        self.starts, ends = [bar[0] for bar in bars], [bar[1] for bar in bars]
        self.ends = sorted(ends)
        self.busy = Integral(self.starts, ends, [needs.get(bar[4], 1) for bar in bars])
        self.failed = [bar[1] for bar in bars if bar[3] != COMPLETED and bar[3] != CANCELED]
        latest = itertools.accumulate(ends, max)
        gaps = [(end, start) for end, start in zip(latest, self.starts[1:]) if start > end]
        self.gaps = [gap for gap in gaps if gap[1] - gap[0] >= 1000]
        self.idle = Integral([gap[0] for gap in gaps], [gap[1] for gap in gaps], [1] * len(gaps))

    def number(self, begin, end):
        """How many of its jobs fall into a stretch."""
        from bisect import bisect_left, bisect_right
        return bisect_left(self.starts, end) - bisect_right(self.ends, begin)


class Attempts:
    """Every attempt of a workflow that has ended, as columns in the order of the results' ids."""

    COLUMNS = ("r.id", "r.job_id", "r.compute_node_id", "j.resource_requirements_id", "r.status",
               "r.run_id", f"CAST({MS.format('r.completion_time')} AS INT)",
               "CAST(round(r.exec_time_minutes * 60000) AS INT)",
               "CAST(coalesce(r.avg_cpu_percent, -1) AS INT)",
               "coalesce(r.avg_memory_bytes, r.peak_memory_bytes, -1)")

    NAMED = [f"{column} AS c{number}" for number, column in enumerate(COLUMNS)]

    def __init__(self):
        from array import array
        self.columns = [array("q") for _ in self.COLUMNS]
        self.began = {}                   # run id: ms of its first start
        self.summed = [None, 0, {}]       # of which shape, of how many, by family
        self.laid = 0, {}, {}, None       # see lanes
        self.loaded = 0, None, None       # see loads

    @property
    def last_id(self):
        """Id of the newest result known."""
        return self.columns[0][-1] if self.columns[0] else 0

    def extend(self, columns):
        """Take newer results."""
        for mine, new in zip(self.columns, columns):
            mine.extend(new)
        for run_id, end, ran in zip(columns[5], columns[6], columns[7]):
            start = end - ran
            if start < self.began.get(run_id, start + 1):
                self.began[run_id] = start

    def averages(self, shape):
        """{family: [attempts, ms they ran together]}; only new attempts are looked at."""
        if self.summed[0] != shape.number:
            self.summed = [shape.number, 0, {}]
        _, known, sums = self.summed
        self.summed[1] = len(self.columns[7])
        for job_id, ran in zip(self.columns[1][known:], self.columns[7][known:]):
            entry = sums.setdefault(shape.family_of.get(job_id), [0, 0])
            entry[0] += 1
            entry[1] += ran
        return sums

    def lanes(self, needs):
        """{node id: Lane}; only lanes of new attempts are laid anew. needs: see timeline."""
        known, lanes, bars, old = self.laid
        if old != needs:
            known, lanes, bars = 0, {}, {}
        touched = set()
        for job_id, node, need, status, end, ran in zip(
                *(self.columns[place][known:] for place in (1, 2, 3, 4, 6, 7))):
            bars.setdefault(node, []).append((end - ran, end, job_id, status, need))
            touched.add(node)
        for node in touched:
            bars[node].sort()             # nearly in order already
            lanes[node] = Lane(bars[node], needs)
        self.laid = len(self.columns[-1]), lanes, bars, needs
        return lanes

    def loads(self, needs):
        """[Integral, ...] of CPUs asked for, memory, CPUs used, memory used; and {requirement id:
        (mean CPUs, mean memory) that its jobs used}. needs: see usage."""
        number, known, loads = self.loaded
        if (number, known) != (len(self.columns[-1]), needs):
            _, _, _, need, _, _, ends, rans, percents, sizes = self.columns
            starts = [end - ran for end, ran in zip(ends, rans)]
            asked = [needs.get(one, (0, 0)) for one in need]
            used = [max(0, percent) / 100 for percent in percents]
            kept = [max(0, size) for size in sizes]
            weights = ([one[0] for one in asked], [one[1] for one in asked], used, kept)
            sums = {}
            for one, ran, cpu, size in zip(need, rans, used, kept):
                total = sums.setdefault(one, [1, 0, 0])
                total[0] += ran
                total[1] += cpu * ran
                total[2] += size * ran
            loads = ([Integral(starts, ends, weight) for weight in weights],
                     {one: (cpu / ran, size / ran) for one, (ran, cpu, size) in sums.items()})
            self.loaded = len(self.columns[-1]), needs, loads
        return loads

    def ends_since(self, moment):
        """Ends (ms) of attempts not before `moment`, the newest first."""
        found = []
        for end in reversed(self.columns[6]):
            if end < moment - 600_000:    # a replayed journal may come late
                break
            if end >= moment:
                found.append(end)
        return found


def attempts(store, workflow_id):
    """The Attempts of a workflow; only new results are read, unless older ones were replaced."""
    source = ("FROM result r CROSS JOIN job j ON j.id = r.job_id WHERE r.workflow_id = ?"
              " AND r.id > ? ORDER BY r.id")
    with store.keeping:
        known = store.kept.get(("attempts", workflow_id)) or Attempts()
        for _ in range(2):
            known.extend(json_columns(store, [f"c{number}" for number in range(len(known.COLUMNS))],
                              f"FROM (SELECT {', '.join(known.NAMED)} {source})",
                              (workflow_id, known.last_id)))
            number = store.one("SELECT count(*) FROM result WHERE workflow_id = ? AND id <= ?",
                               (workflow_id, known.last_id))[0]
            if number == len(known.columns[0]):
                break
            known = Attempts()
        return keep(store, ("attempts", workflow_id), known)


# ---- how far a workflow is

def workflow_state(number, canceled, active):
    """A workflow's state in a word. number: {status: jobs}; active: a runner is at work."""
    at_work = number.get(PENDING, 0) + number.get(RUNNING, 0)
    waiting = sum(number.get(status, 0) for status in (BLOCKED, READY, PENDING_FAILED))
    if canceled:
        return "canceled"
    if at_work or number.get(READY) and active:
        return "running"
    if not waiting and (number.get(UNINITIALIZED) or not number):
        return "not initialized"
    if not waiting:
        return "failed" if any(number.get(status) for status in UNSUCCESSFUL) else "done"
    return "waiting" if number.get(READY) else "stuck"


def progress(store, workflow_ids):
    """{workflow id: counts by status name, total, done, state, created_ms, run_id, output_dir}."""
    text = compact(list(workflow_ids))
    numbers = {workflow_id: {} for workflow_id in workflow_ids}
    for workflow_id, status, number in store.query(
            f"SELECT workflow_id, status, count(*) FROM job WHERE workflow_id IN {IDS}"
            " GROUP BY workflow_id, status", (text,)):
        numbers[workflow_id][status] = number
    active = {row[0] for row in store.query(
        f"SELECT DISTINCT workflow_id FROM compute_node WHERE workflow_id IN {IDS}"
        " AND is_active = 1", (text,))}
    places = dict(store.query(
        f"SELECT workflow_id, output_dir FROM compute_node WHERE workflow_id IN {IDS}"
        " AND output_dir IS NOT NULL ORDER BY id", (text,)))
    answer = {}
    for workflow_id, run_id, canceled, created in store.query(
            f"SELECT id, run_id, is_canceled, {MS.format('timestamp')} FROM workflow WHERE id IN"
            f" {IDS}", (text,)):
        number = numbers[workflow_id]
        state = workflow_state(number, canceled, workflow_id in active)
        if state == "running" and number.get(READY) and not (
                number.get(PENDING) or number.get(RUNNING)) and (
                sum(row[1] for row in unfit(store, workflow_id)) == number[READY]):
            state = "stuck"
        answer[workflow_id] = {
            "counts": {STATUS_NAMES[status]: count for status, count in sorted(number.items())},
            "total": sum(number.values()), "done": sum(number.get(one, 0) for one in DONE_SET),
            "state": state, "created_ms": int(created or 0), "run_id": run_id,
            "output_dir": places.get(workflow_id)}
    return answer


def active_nodes(store, workflow_id):
    """Runners at work: (id, hostname, cpus, memory_bytes, gpus, nodes)."""
    return store.query(
        "SELECT id, hostname, num_cpus * max(num_nodes, 1), memory_gb * 1073741824, num_gpus,"
        " num_nodes FROM compute_node WHERE workflow_id = ? AND is_active = 1 ORDER BY id",
        (workflow_id,))


def unfit(store, workflow_id):
    """Requirements of ready jobs that no runner at work can hold: [(sentence, jobs), ...]."""
    nodes = active_nodes(store, workflow_id)
    found = []
    for need_id, cpus, memory, gpus, count in store.query(
            "SELECT id, num_cpus, memory_bytes, num_gpus, num_nodes FROM resource_requirements"
            " WHERE workflow_id = ?", (workflow_id,)):
        lacks = []
        for _, _, has, has_memory, has_gpus, has_nodes in nodes:
            per = max(has_nodes, 1)
            pairs = (("GPU", gpus, has_gpus), ("CPU", cpus, has // per), ("node", count, per))
            lack = [(f"{plural(want, word)}", str(have)) for word, want, have in pairs
                    if want > have]
            if memory > has_memory:
                lack.append((f"{format_bytes(memory)} of memory", format_bytes(has_memory)))
            lacks.append(lack)
        if lacks and all(lacks):
            number = store.one("SELECT count(*) FROM job WHERE resource_requirements_id = ? AND"
                               f" status = {READY}", (need_id,))[0]
            what, most = max((lack[0] for lack in lacks), key=lambda pair: (len(pair[1]), pair[1]))
            if number:
                found.append((f"{'it needs' if number == 1 else 'each needs'} {what}, the largest "
                              f"runner has {most}: {'it' if number == 1 else 'none of them'} can "
                              f"{'not ' if number == 1 else ''}start", number))
    return found


def waiting_ready(store, workflow_id, number, canceled):
    """Why ready jobs are not running: [(jobs, sentence), ...]."""
    nodes = active_nodes(store, workflow_id)
    if canceled:
        return [(number, "the workflow is canceled")]
    if not nodes:
        scheduled = store.one("SELECT count(*) FROM scheduled_compute_node WHERE workflow_id = ?"
                              " AND status = 'pending'", (workflow_id,))[0]
        return [(number, f"{plural(scheduled, 'allocation')} of Slurm must begin first" if scheduled
                 else "no runner is up: run here, or submit to Slurm")]
    rows = [(count, sentence) for sentence, count in unfit(store, workflow_id)]
    rest = number - sum(count for count, _ in rows)
    if rest > 0:
        busy = store.one(
            "SELECT total(q.num_cpus * q.num_nodes) FROM job j JOIN resource_requirements q ON q.id"
            f" = j.resource_requirements_id WHERE j.workflow_id = ? AND j.status IN ({PENDING},"
            f" {RUNNING})", (workflow_id,))[0]
        cpus = sum(row[2] for row in nodes)
        whose = "the runner" if len(nodes) == 1 else f"the {len(nodes)} runners"
        rows.append((rest, f"every CPU of {whose} is busy" if busy >= cpus else
                     f"a free place on {whose} is needed ({busy:.0f} of {cpus} CPUs are busy)"))
    return rows


def waiting_families(shape, counted):
    """Why blocked jobs of a large workflow wait: [(jobs, sentence), ...], by family."""
    rows = []
    for family, number in enumerate(row.get("blocked", 0) for row in counted):
        if not number:
            continue
        size, phrases = shape.sizes[family], []
        whole = "all wait for" if size > 1 else "waits for"
        for (before, after), edges in sorted(shape.edges.items()):
            open_jobs = before != after and after == family and shape.sizes[before] - sum(
                counted[before].get(STATUS_NAMES[status], 0) for status in COMPLETE_SET)
            if not open_jobs:
                continue
            label, width = shape.labels[before], shape.sizes[before]
            if width == 1:
                phrases.append(f"{whole} {label}")
            elif edges >= size * width:
                phrases.append(f"{whole} every {label}")
            elif edges == size == width:
                phrases.append(f"each waits for its own {label}")
            else:
                phrases.append(f"each waits for {max(1, round(edges / size)):,} {label}")
        if family in shape.chained and not phrases:
            phrases.append("each waits for the one before it")
        rows.append((number, f"{shape.labels[family]}: "
                     + (", ".join(phrases[:3]) or "waits for jobs that are not done")))
    return rows


def waiting_jobs(store, workflow_id):
    """Why blocked jobs of a small workflow wait: [(jobs, sentence), ...], by what they wait for."""
    waits, bad, names, order = {}, {}, {}, {}
    for job_id, name, keeps, before, before_name, status in store.query(
            "SELECT j.id, j.name, NOT j.cancel_on_blocking_job_failure, p.id, p.name, p.status"
            " FROM job j JOIN job_dependency d ON d.job_id = j.id JOIN job p ON p.id ="
            f" d.depends_on_job_id WHERE j.workflow_id = ? AND j.status = {BLOCKED} AND p.status"
            f" <> {COMPLETED} ORDER BY j.id, p.id", (workflow_id,)):
        names[job_id] = name
        if status not in COMPLETE_SET:
            waits.setdefault(job_id, {})[before] = before_name
        elif not keeps:
            bad.setdefault(job_id, f"{before_name} {STATUS_PAST[status]}")
    doomed, more = set(bad), set(bad)
    while more:
        more = {job_id for job_id, before in waits.items() if more & set(before)} - doomed
        doomed |= more
    for job_id in names:
        before = waits.get(job_id, {})
        order.setdefault((tuple(before.values()), bad.get(job_id), job_id in doomed), []).append(
            names[job_id])
    rows = []
    for (before, cause, ends), members in order.items():
        one = len(members) == 1
        text = f"{plain_names(members)} {'waits' if one else 'wait'} for {plain_names(before)}"
        it = "it" if one else "they"
        if cause:
            text += f"; {cause}, so {it} will be canceled then"
        elif ends:
            text += ", and will be canceled with it"
        rows.append((len(members), text))
    return rows


def pace(store, workflow_id, run_id, done, now):
    """How fast jobs end: rate (a minute), history (60 minutes of them), started_ms, ended_ms."""
    known = attempts(store, workflow_id)
    ends, now_ms = known.ends_since(now * 1000 - 3_600_000), now * 1000
    history = [0] * 60
    for end in ends:
        history[max(0, min(59, 59 - int((now_ms - end) // 60_000)))] += 1
    running = store.one(f"SELECT min(started_ms) FROM job WHERE workflow_id = ? AND status ="
                        f" {RUNNING}", (workflow_id,))[0]
    starts = [moment for moment in (known.began.get(run_id), running) if moment]
    started = min(starts) if starts else None
    up = max(1.0, (now_ms - (started or now_ms)) / 60_000)
    lately = sum(history[-10:])
    rate = lately / min(10, up) if lately >= 10 else len(ends) / min(60, up)
    last = known.columns[6][-1] if known.columns[6] else None
    return {"rate": round(rate, 3), "history": history, "started_ms": started, "ended_ms": last,
            "elapsed_s": ((last if not running and last else now_ms) - started) / 1000
            if started else None}


def runners_text(nodes):
    """How many runners are at work and where: "6 on c101 to c106, 96 CPUs"."""
    if not nodes:
        return "none"
    hosts = list(dict.fromkeys(row[1] for row in nodes))
    where = f"{hosts[0]} to {hosts[-1]}" if len(hosts) > 3 else plain_names(hosts)
    return f"{len(nodes)} on {where}, {plural(sum(row[2] for row in nodes), 'CPU')}"


def summary(store, workflow_id, now):
    """All that the overview of a workflow shows. Raises NotFound."""
    run_id, canceled = workflow_row(store, workflow_id, "run_id, is_canceled")
    answer = progress(store, [workflow_id])[workflow_id]
    counted, total = answer["counts"], answer["total"]
    large = total > FEW_JOBS
    shape = shape_of(store, workflow_id) if large else None
    by_family = family_counts(store, workflow_id, shape) if large else None
    waiting = []
    if counted.get("ready"):
        waiting += [(*row, "ready") for row in waiting_ready(store, workflow_id, counted["ready"],
                                                             canceled)]
    if counted.get("blocked"):
        waiting += [(*row, "blocked") for row in (waiting_families(shape, by_family) if large
                                                  else waiting_jobs(store, workflow_id))]
    for status, sentence in (("pending_failed", "failed, and wait for your decision"),
                             ("uninitialized", "not initialized yet"),
                             ("disabled", "disabled, will not run")):
        if counted.get(status):
            waiting.append((counted[status], sentence, status))
    answer.update(pace(store, workflow_id, run_id, answer["done"], now))
    nodes = active_nodes(store, workflow_id)
    left = total - answer["done"]
    longest = [row[0] for row in store.query(
        f"SELECT id FROM job WHERE workflow_id = ? AND status = {RUNNING} ORDER BY started_ms, id"
        " LIMIT 5", (workflow_id,))]
    failed = any(counted.get(name) for name in ("failed", "terminated", "pending_failed"))
    groups = failures(store, workflow_id, most=1000)["groups"] if failed else []
    return {**answer, "left_s": round(60 * left / answer["rate"]) if answer["rate"] and left
            else None, "runners": len(nodes), "runners_text": runners_text(nodes),
            "waiting": [{"count": number, "status": status, "why": why_text}
                        for number, why_text, status in waiting[:8]],
            "longest": list(job_views(store, longest, now).values()),
            "failures": [{name: group[name] for name in ("count", "cause", "line")}
                         for group in groups[:3]],
            "families": family_nodes(store, workflow_id, shape, by_family) if large else None}


# ---- jobs with how they ended

def exit_text(status, code, codes):
    """How an attempt ended, in two words: "exit 137, out of memory"."""
    import signal
    meaning = {codes["memory"]: "out of memory", ORPHAN_RETURN_CODE: "its runner died",
               126: "cannot be executed", 127: "command not found"}.get(code, "")
    if code == codes["time"] or status == TERMINATED:
        meaning = "time limit" if code == codes["time"] else "ended by Torc"
    if not meaning and 128 < code < 193:
        with contextlib.suppress(ValueError):
            meaning = signal.Signals(code - 128).name
    return f"exit {code}" + (f", {meaning}" if meaning else "")


def exit_codes(store, workflow_id):
    """The return codes that stand for memory and time in a workflow."""
    text = workflow_row(store, workflow_id, "execution_config")[0]
    config = json.loads(text or "{}")
    config = config if isinstance(config, dict) else {}
    return {"memory": config.get("oom_exit_code", 137),
            "time": config.get("timeout_exit_code", 152)}


def job_views(store, job_ids, now):
    """{job id: what a row of the list of jobs shows besides the record}, in the order given."""
    ids = compact(list(job_ids))
    views, codes, waits, ends = {job_id: {} for job_id in job_ids}, {}, [], []
    for (job_id, workflow_id, name, status, attempt, started, unfinished, cascaded, command, need,
         cpus, memory, runtime, ran, end, peak, code, host) in store.query(
            "SELECT j.id, j.workflow_id, j.name, j.status, j.attempt_id, j.started_ms,"
            " j.unfinished, j.cascaded, j.command, q.name, q.num_cpus, q.memory_bytes, q.runtime_s,"
            f" r.exec_time_minutes * 60, {MS.format('r.completion_time')}, r.peak_memory_bytes,"
            " r.return_code, n.hostname FROM job j JOIN resource_requirements q ON q.id ="
            " j.resource_requirements_id LEFT JOIN latest_result l ON l.job_id = j.id AND j.status"
            f" IN ({', '.join(map(str, FINAL_SET))}) LEFT JOIN result r ON r.id = l.result_id"
            " LEFT JOIN compute_node n ON n.id = coalesce(r.compute_node_id, j.compute_node_id)"
            f" WHERE j.id IN {IDS}", (ids,)):
        if workflow_id not in codes:
            codes[workflow_id] = exit_codes(store, workflow_id)
        if status == RUNNING:
            start, ran = started, (now * 1000 - started) / 1000 if started else None
        else:
            start = round(end - ran * 1000) if end and ran is not None else None
        note = ""
        if status in (FAILED, TERMINATED, PENDING_FAILED) and code is not None:
            note = exit_text(status, code, codes[workflow_id])
        elif status == BLOCKED:
            note = f"waits for {unfinished:,} jobs"
            waits += [job_id] if unfinished == 1 else []
        elif status == CANCELED and cascaded:
            ends.append(job_id)
        elif status == READY:
            note = "waits for a free place"
        views[job_id] = {
            "id": job_id, "name": name, "family": family_name(name), "command": command,
            "status": STATUS_NAMES[status], "attempt_id": attempt, "num_cpus": cpus,
            "memory_bytes": memory, "runtime_s": runtime, "requirement": need, "host": host or "",
            "start_ms": start,
            "ran_s": None if ran is None else round(ran, 3), "peak_memory_bytes": peak,
            "note": note}
    for job_id, name in store.query(
            "SELECT d.job_id, p.name FROM job_dependency d JOIN job p ON p.id = d.depends_on_job_id"
            f" WHERE d.job_id IN {IDS} AND p.status NOT IN {COMPLETE}", (compact(waits),)):
        views[job_id]["note"] = f"waits for {name}"
    for job_id, name, status in store.query(
            "SELECT d.job_id, p.name, p.status FROM job_dependency d JOIN job p ON p.id ="
            f" d.depends_on_job_id WHERE d.job_id IN {IDS} AND p.status IN"
            f" ({FAILED}, {CANCELED}, {TERMINATED}) ORDER BY p.id DESC", (compact(ends),)):
        views[job_id]["note"] = f"{name} {STATUS_PAST[status]}"
    return views


JOB_ORDERS = {                            # what a list of jobs can be sorted by besides its columns
    "start": f"CASE WHEN t.status = {RUNNING} THEN t.started_ms ELSE"
             f" {MS.format('r.completion_time')} - round(r.exec_time_minutes * 60000) END",
    "ran": f"CASE WHEN t.status = {RUNNING} THEN (clock.now - t.started_ms) / 60000.0 ELSE"
           " r.exec_time_minutes END",
    "memory": "r.peak_memory_bytes", "host": "n.hostname",
    "note": "r.return_code"}


def job_page(store, page, where, params, now):
    """A list envelope of jobs, sorted by a key of JOB_ORDERS; see listing."""
    direction = "DESC" if page.reverse else "ASC"
    total = store.one(f"SELECT count(*) FROM job t WHERE {where}", params)[0]
    ids = [row[0] for row in store.query(
        "SELECT t.id FROM (SELECT ? AS now) clock CROSS JOIN job t LEFT JOIN latest_result l"
        " ON l.job_id = t.id LEFT JOIN result r ON r.id = l.result_id LEFT JOIN compute_node n ON"
        f" n.id = r.compute_node_id WHERE {where} ORDER BY {JOB_ORDERS[page.sort_by]} {direction},"
        f" t.id {direction} LIMIT ? OFFSET ?",
        (int(now * 1000), *params, page.limit, max(page.offset, 0)))]
    records = {record["id"]: record for record in listing(
        store, KINDS["job"], Page(), f"t.id IN {IDS}", (compact(ids),))["items"]}
    return envelope([records[job_id] for job_id in ids if job_id in records], page, total)


def job_details(store, job_id):
    """What the page of one job shows besides: CPUs used, failure handler, files read, written."""
    used, handler, priority = store.one(
        "SELECT r.avg_cpu_percent, h.name, j.priority FROM job j LEFT JOIN latest_result l ON"
        " l.job_id = j.id LEFT JOIN result r ON r.id = l.result_id LEFT JOIN failure_handler h ON"
        " h.id = j.failure_handler_id WHERE j.id = ?", (job_id,))
    paths = {}
    for what in ("input", "output"):
        paths[what + "s"] = ", ".join(row[0] for row in store.query(
            f"SELECT f.path FROM job_{what}_file x JOIN file f ON f.id = x.file_id WHERE x.job_id"
            " = ? ORDER BY f.id LIMIT 100", (job_id,))) or None
    return {"cpu_used": None if used is None else f"{used / 100:.1f}", "handler": handler,
            "priority": priority, **paths}


# ---- graph

def acyclic(number, edges):
    """Edges without those that close a circle, of nodes 0 to number - 1."""
    after, state, kept = {}, [0] * number, []
    for before, other in sorted(edges):
        if before != other:
            after.setdefault(before, []).append(other)
    for root in range(number):
        stack = [(root, iter(after.get(root, ())))] if not state[root] else []
        state[root] = state[root] or 1
        while stack:
            node, rest = stack[-1]
            other = next(rest, None)
            if other is None:
                state[node] = 2
                stack.pop()
            elif state[other] != 1:       # 1: on the way here, so this edge would close a circle
                kept.append((node, other))
                if not state[other]:
                    state[other] = 1
                    stack.append((other, iter(after.get(other, ()))))
    return kept


FAMILY_STATUS = ("failed", "terminated", "pending_failed", "running", "pending", "ready", "blocked",
                 "uninitialized", "canceled", "completed", "disabled")


def family_nodes(store, workflow_id, shape, counted):
    """The nodes of a graph of families."""
    averages = attempts(store, workflow_id).averages(shape)
    nodes = []
    for family, label in enumerate(shape.labels):
        counts_of, size = counted[family], shape.sizes[family]
        active = next((name for name in ("running", "pending", "ready", "blocked")
                       if counts_of.get(name)), None)
        status = active or next((name for name in FAMILY_STATUS if counts_of.get(name)),
                                "uninitialized")
        ran = averages.get(family)
        sub = (f"each {span(ran[1] / ran[0] / 1000)} on average" if ran and size > 1 else
               f"1 job, took {span(ran[1] / ran[0] / 1000)}" if ran else
               f"{plural(size, 'job')}, none has ended")
        nodes.append({"id": f"f{family}", "name": label, "family": shape.names[family],
                      "counts": counts_of, "status": status, "sub": sub,
                      "why": ", ".join(f"{number:,} {name.replace('_', ' ')}"
                                       for name, number in counts_of.items()),
                      "href": f"#/w/{workflow_id}/jobs?family={shape.names[family]}"})
    return nodes


def graph(store, workflow_id, now):
    """Nodes and edges of a workflow: its jobs, or its families if there are many."""
    total = store.one("SELECT count(*) FROM job WHERE workflow_id = ?", (workflow_id,))[0]
    if total > FEW_JOBS:
        shape = shape_of(store, workflow_id)
        nodes = family_nodes(store, workflow_id, shape, family_counts(store, workflow_id, shape))
        return {"families": True, "total": total, "nodes": nodes,
                "edges": [[f"f{one}", f"f{other}"]
                          for one, other in acyclic(len(nodes), shape.edges)]}
    ids = [row[0] for row in store.query("SELECT id FROM job WHERE workflow_id = ? ORDER BY id",
                                         (workflow_id,))]
    place = {job_id: number for number, job_id in enumerate(ids)}
    pairs = store.query("SELECT d.depends_on_job_id, d.job_id FROM job j JOIN job_dependency d ON"
                        " d.job_id = j.id WHERE j.workflow_id = ?", (workflow_id,))
    edges = acyclic(len(ids), [(place[one], place[other]) for one, other in pairs
                               if one in place and other in place])
    return {"families": False, "total": total, "nodes": job_nodes(store, workflow_id, ids, now),
            "edges": [[ids[one], ids[other]] for one, other in edges]}


def job_nodes(store, workflow_id, job_ids, now):
    """The nodes of a graph of jobs."""
    nodes = []
    for job_id, view in job_views(store, job_ids, now).items():
        status, ran = view["status"], view["ran_s"]
        said = status.replace("_", " ")
        why_text = (f"runs for {span(ran)} of {span(view['runtime_s'])}" if status == "running"
                    and ran is not None else
                    f"completed in {span(ran)}" if status == "completed" and ran is not None else
                    f"{said}: {view['note']}" if view["note"] and status not in (
                        "blocked", "ready") else view["note"] or said)
        nodes.append({"id": job_id, "name": view["name"], "status": status,
                      "sub": "" if ran is None else span(ran), "why": why_text,
                      "href": f"#/w/{workflow_id}/jobs/{job_id}"})
    return nodes


def graph_around(store, workflow_id, job_id, now, most=5):
    """A job with what it waits for and what waits for it, at most 5 each. Raises NotFound."""
    if job_row(store, job_id).workflow_id != workflow_id:
        raise not_found(KINDS["job"], job_id)
    ids, edges, more = [job_id], [], []
    for mine, theirs, words in (("job_id", "depends_on_job_id", "waits for"),
                                ("depends_on_job_id", "job_id", "frees")):
        # Those that matter now first: what is not done, then what went badly.
        found = store.query(
            f"SELECT d.{theirs} FROM job_dependency d JOIN job j ON j.id = d.{theirs} WHERE"
            f" d.{mine} = ? AND d.{theirs} <> d.{mine} ORDER BY j.status IN {COMPLETE}, j.status ="
            f" {COMPLETED}, j.id LIMIT ?", (job_id, most))
        number = store.one(f"SELECT count(*) FROM job_dependency WHERE {mine} = ?", (job_id,))[0]
        if number > len(found):
            more.append(f"{words} {number - len(found):,} more")
        for other, in found:
            edges.append([other, job_id] if mine == "job_id" else [job_id, other])
            ids.append(other)
    return {"nodes": job_nodes(store, workflow_id, dict.fromkeys(ids), now), "edges": edges,
            "more": ", ".join(more)}


# ---- failures

def failures(store, workflow_id, most=5000, wanted=None):
    """Jobs that ended badly, in groups of one cause: exit, and last line of stderr.

    most: the latest so many are looked at. wanted: id of the only group, with all its job ids.
    """
    bad = f"({FAILED}, {TERMINATED}, {PENDING_FAILED})"
    codes = exit_codes(store, workflow_id)
    number = dict(store.query(
        f"SELECT status, count(*) FROM job WHERE workflow_id = ? AND status IN {bad} GROUP BY"
        " status", (workflow_id,)))
    downstream = store.one(f"SELECT total(cascaded) FROM job WHERE workflow_id = ? AND status ="
                           f" {CANCELED}", (workflow_id,))[0]
    groups = {}
    rows = store.query(
        "SELECT j.id, j.name, j.status, r.id, r.return_code, r.exec_time_minutes * 60,"
        f" {MS.format('r.completion_time')}, r.peak_memory_bytes, n.hostname,"
        " substr(r.stderr_tail, -400), q.memory_bytes, q.runtime_s, q.name, j.attempt_id FROM job j"
        " JOIN resource_requirements q ON q.id = j.resource_requirements_id LEFT JOIN latest_result"
        " l ON l.job_id = j.id LEFT JOIN result r ON r.id = l.result_id LEFT JOIN compute_node n"
        f" ON n.id = r.compute_node_id WHERE j.workflow_id = ? AND j.status IN {bad}"
        " ORDER BY r.id DESC LIMIT ?", (workflow_id, most))
    for row in rows:
        one = Failure(*row)
        lines = (one.tail or "").strip().splitlines()
        line = lines[-1].strip()[-300:] if lines else ""
        key = one.status, one.code, re.sub(r"\d+", "#", line)
        groups.setdefault(key, []).append((one, line))
    answer = []
    for key, members in groups.items():
        group_id = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
        if wanted is None or wanted == group_id:
            answer.append({"id": group_id, **failure_group(store, members, codes)})
            if wanted:
                answer[-1]["job_ids"] = sorted(one.job_id for one, _ in members)
    answer.sort(key=lambda group: (-group["count"], group["first_ms"] or 0))
    return {"groups": answer, "total": sum(number.values()), "downstream": int(downstream),
            "looked_at": len(rows)}


class Failure(NamedTuple):
    """A job that ended badly, with its latest result."""

    job_id: int
    name: str
    status: int
    result_id: int | None
    code: int | None
    ran_s: float | None
    ended_ms: float | None
    peak: int | None
    host: str | None
    tail: str | None
    memory: int
    runtime_s: int
    need: str
    attempt: int


def failure_group(store, members, codes):
    """What is said of jobs that failed alike. members: [(Failure, last line), ...]."""
    jobs = [one for one, _ in members]
    first, line = members[-1]             # they come with the latest first
    families = list(dict.fromkeys(family_name(one.name) for one in jobs))
    hosts = sorted({one.host for one in jobs if one.host})
    ended = [one.ended_ms for one in jobs if one.ended_ms]
    verdict, remedy, advice = failure_remedy(jobs, codes)
    tail = store.one("SELECT stderr_tail FROM result WHERE id = ?", (first.result_id,))
    return {"count": len(jobs), "status": STATUS_NAMES[first.status], "line": line,
            "cause": exit_text(first.status, first.code, codes) if first.code is not None
            else "no result is kept", "verdict": verdict, "remedy": remedy, "advice": advice,
            "family": plain_names(families), "first_ms": int(min(ended)) if ended else None,
            "last_ms": int(max(ended)) if ended else None,
            "hosts": f"{len(hosts)} nodes" if len(hosts) > 3 else plain_names(hosts) if hosts
            else "no node", "jobs": [{"id": one.job_id, "name": one.name} for one in jobs[:3]],
            "tail": (tail[0] if tail else "") or ""}


def failure_remedy(jobs, codes):
    """(verdict, label of a button, advice) for jobs that failed alike."""
    one, peak = jobs[0], max((job.peak or 0 for job in jobs), default=0)
    ran = max((job.ran_s or 0 for job in jobs), default=0)
    alike = "They fail alike: look at one before rerunning them." if len(jobs) > 1 else \
        "Look at its output before rerunning it."
    known = one.need != "default"         # those requirements mean nothing
    limit = max(job.memory for job in jobs)
    over = known and peak > limit
    if over or one.code == codes["memory"] and (not known or ran < 0.8 * one.runtime_s):
        more = -(-int(1.5 * max(limit if known else 0, peak)) // 2**20) * 2**20
        held = f"held {format_bytes(peak)}" if peak else "were killed" if len(jobs) > 1 \
            else "was killed"
        if not known and not peak:
            return ("memory", "Rerun these…", f"{held[0].upper()}{held[1:]}, perhaps for memory: "
                    "they have no resource requirements that could be raised.")
        return ("memory", f"Rerun with {format_bytes(more)}…",
                f"Asked for {format_bytes(limit)} and {held}." if known else
                f"Asked for nothing and {held}.")
    if one.code == codes["time"] or known and one.status != FAILED and ran > 0.9 * one.runtime_s:
        more = max(1, math.ceil(1.4 * max(ran, one.runtime_s) / 60))
        return ("runtime", f"Rerun with {more} min…", f"Ran into the runtime of "
                f"{span(one.runtime_s)} asked for.")
    if one.code == ORPHAN_RETURN_CODE:
        return ("lost", "Rerun these…", "Their runner died: nothing says that the jobs are bad."
                if len(jobs) > 1 else "Its runner died: nothing says that the job is bad.")
    missing = {126: "The command cannot be executed: is the file executable?",
               127: "The command was not found: a module that is not loaded, or a wrong path."}
    return "unknown", "Rerun these…", missing.get(one.code, alike)


# ---- over time

MOST_BARS = 2000                          # jobs that a timeline shows one by one


def nodes_over_time(store, workflow_id, now):
    """Runners: (id, name, cpus, memory_bytes, start ms, end ms, active), by start."""
    found = []
    for node_id, host, cpus, memory, start, ran, active in store.query(
            "SELECT id, hostname, num_cpus * max(num_nodes, 1), memory_gb * max(num_nodes, 1) *"
            f" 1073741824, {MS.format('start_time')}, duration_seconds, is_active FROM compute_node"
            " WHERE workflow_id = ? ORDER BY id", (workflow_id,)):
        end = now * 1000 if active or ran is None or start is None else start + ran * 1000
        found.append((node_id, host, cpus, memory, start or now * 1000, end, bool(active)))
    return found


def running_jobs(store, workflow_id):
    """Jobs that run: (id, node id, requirement id, start ms or None)."""
    return store.query("SELECT id, compute_node_id, resource_requirements_id, started_ms FROM job"
                       f" WHERE workflow_id = ? AND status = {RUNNING} AND compute_node_id IS NOT"
                       " NULL", (workflow_id,))


def stretch(store, workflow_id, begin, end, nodes, now):
    """The stretch of time to show: what is asked for, or the present run. Milliseconds."""
    run_id = workflow_row(store, workflow_id, "run_id")[0]
    began = attempts(store, workflow_id).began
    starts = [began[run_id]] if run_id in began else [node[4] for node in nodes if node[6]]
    ends = [node[5] for node in nodes]
    begin = begin if begin is not None else int(min(starts, default=now * 1000 - 60_000))
    end = end if end is not None else int(max(ends, default=now * 1000))
    return begin, max(end, begin + 1000)


def timeline(store, workflow_id, begin, end, bins, now):
    """What each runner did from begin to end (ms): its jobs, or how busy it was in each bin.

    bins: [part of its CPUs in use, whether a job failed]. gaps: when it did nothing, with the
    cause, the longest first.
    """
    nodes = nodes_over_time(store, workflow_id, now)
    begin, end = stretch(store, workflow_id, begin, end, nodes, now)
    needs = dict(store.query("SELECT id, num_cpus * num_nodes FROM resource_requirements WHERE"
                             " workflow_id = ?", (workflow_id,)))
    with store.keeping:
        lanes = attempts(store, workflow_id).lanes(needs)
    running = {}
    for job_id, node_id, need, start in running_jobs(store, workflow_id):
        if start and start < end:
            running.setdefault(node_id, []).append((start, int(now * 1000), job_id, RUNNING, need))
    empty, runners = Lane([], needs), []
    single = MOST_BARS >= sum(lane.number(begin, end) for lane in lanes.values()) + sum(
        map(len, running.values()))
    for node in nodes:
        lane, bars = lanes.get(node[0], empty), sorted(running.get(node[0], ()))
        if bars or lane.number(begin, end) or node[4] < end and node[5] > begin:
            shown = runner_lane(store, workflow_id, node, lane, bars, (begin, end), needs)
            runners.append({**shown,
                            **(bars_in_lanes(store, lane, bars, begin, end) if single else
                               busy_bins(node, lane, bars, (begin, end, bins), needs))})
    return {"from": begin, "to": end, "runners": runners}


def runner_lane(store, workflow_id, node, lane, running, view, needs):
    """One runner of a timeline. running: bars of the jobs that run there now, by start."""
    from bisect import bisect_left
    node_id, host, cpus, _, up, down, active = node
    first = min([up, *lane.starts[:1], *(bar[0] for bar in running[:1])])
    last = max([down, *lane.ends[-1:]])
    start, stop = max(first, view[0]), max(min(last, view[1]), max(first, view[0]))
    # From the first of the jobs that run now on, it is not idle.
    until = min([stop, *(bar[0] for bar in running[:1])])
    edges = [(first, lane.starts[0]), (lane.ends[-1], max(last, lane.ends[-1]))] \
        if lane.bars else [(first, last)]
    idle_ms = sum(max(0, min(to, until) - max(since, start)) for since, to in edges)
    if until > start:
        idle_ms += lane.idle.until(until) - lane.idle.until(start)
    least = max(1000, (view[1] - view[0]) / 100)
    clipped = [(max(since, start), min(to, until)) for since, to in (*lane.gaps, *edges)]
    gaps = sorted((gap for gap in clipped if gap[1] - gap[0] >= least),
                  key=lambda gap: gap[0] - gap[1])[:5]
    shown = []
    for since, to in gaps:
        place = bisect_left(lane.starts, to)
        after = [*(bar for bar in running if bar[0] >= to), *lane.bars[place:place + 1]]
        cause = gap_cause(store, workflow_id, since, to, min(after, default=None), active)
        shown.append({"from": int(since), "to": int(to),
                      "text": f"idle {span((to - since) / 1000)}, {cause}"})
    if not active and down < view[1] - least:
        shown.append({"from": int(down), "to": int(view[1]), "text": gone_text(store, node_id)})
    busy = lane.busy.until(stop) - lane.busy.until(start) + sum(
        needs.get(bar[4], 1) * max(0, stop - max(bar[0], start)) for bar in running)
    return {"id": node_id, "name": host, "cpus": cpus, "start": int(start), "end": int(stop),
            "ran": lane.number(*view) + len(running), "gaps": shown,
            "idle_s": round(idle_ms / 1000, 1),
            "busy": max(0, min(100, round(100 * busy / max(1, cpus * (stop - start)))))}


def busy_bins(node, lane, running, view, needs):
    """The bins of a runner in a timeline."""
    begin, end, bins = view
    means = lane.busy.means(*view)
    if running:
        now = Integral([bar[0] for bar in running], [bar[1] for bar in running],
                       [needs.get(bar[4], 1) for bar in running])
        means = [one + other for one, other in zip(means, now.means(*view))]
    failed = {int((moment - begin) * bins / (end - begin)) for moment in lane.failed
              if begin <= moment < end}
    return {"bins": [[round(min(1.0, mean / max(1, node[2])), 3), number in failed]
                     for number, mean in enumerate(means)]}


def bars_in_lanes(store, lane, running, begin, end):
    """The jobs of a runner in a timeline, each in the first row that is free when it starts."""
    bars = sorted([*(bar for bar in lane.bars if bar[1] > begin and bar[0] < end), *running])
    names = dict(store.query(f"SELECT id, name FROM job WHERE id IN {IDS}",
                             (compact([bar[2] for bar in bars]),)))
    rows, jobs = [], []
    for start, stop, job_id, status, _ in bars:
        row = next((number for number, until in enumerate(rows) if until <= start), len(rows))
        rows[row:row + 1] = [stop]
        jobs.append({"id": job_id, "name": names.get(job_id, f"job {job_id}"),
                     "status": STATUS_NAMES[status], "start": start, "end": stop, "lane": row})
    return {"jobs": jobs}


def gap_cause(store, workflow_id, first, last, after, active):
    """Why a runner idled from first to last (ms). after: the bar that ended this, or None."""
    if after:                             # what did that job wait for?
        row = store.one(
            "SELECT p.name FROM job_dependency d JOIN job p ON p.id = d.depends_on_job_id JOIN"
            " latest_result l ON l.job_id = p.id JOIN result r ON r.id = l.result_id WHERE d.job_id"
            f" = ? AND {MS.format('r.completion_time')} BETWEEN ? AND ? ORDER BY r.completion_time"
            " DESC LIMIT 1", (after[2], first + 1, last + 1000))
        return f"waited for {row[0]}" if row else "nothing was ready"
    ready = active and store.one(
        f"SELECT EXISTS (SELECT 1 FROM job WHERE workflow_id = ? AND status = {READY})",
        (workflow_id,))[0]
    return "what is ready does not fit" if ready else (
        "nothing is ready" if active else "nothing was ready")


def gone_text(store, node_id):
    """What became of a runner that is gone."""
    lost = store.one("SELECT count(*) FROM result WHERE compute_node_id = ? AND return_code = ?",
                     (node_id, ORPHAN_RETURN_CODE))[0]
    return f"lost, with {plural(lost, 'job')} that ran there" if lost else "ended"


def usage(store, workflow_id, begin, end, bins, now):
    """CPUs and memory over time, and by resource requirements: asked for, used, there.

    What a running job uses is not known yet: it counts as jobs of its requirements did so far.
    """
    nodes = nodes_over_time(store, workflow_id, now)
    begin, end = stretch(store, workflow_id, begin, end, nodes, now)
    needs = {row[0]: row[1:] for row in store.query(
        "SELECT id, num_cpus * num_nodes, memory_bytes * num_nodes, name, runtime_s FROM"
        " resource_requirements WHERE workflow_id = ?", (workflow_id,))}
    with store.keeping:
        loads, means = attempts(store, workflow_id).loads(needs)
    running = [(start, *needs[need][:2], *means.get(need, (0, 0)))
               for _, _, need, start in running_jobs(store, workflow_id) if start and need in needs]
    starts, stops = [row[0] for row in running], [int(now * 1000)] * len(running)
    points = [[one + other for one, other in zip(
        load.means(begin, end, bins),
        Integral(starts, stops, [row[place] for row in running]).means(begin, end, bins))]
        for place, load in enumerate(loads, 1)]
    points += [Integral([node[4] for node in nodes], [node[5] for node in nodes],
                        [node[place] for node in nodes]).means(begin, end, bins)
               for place in (2, 3)]
    series = {what: [{"name": name, "kind": kind, "points": [
        round(value, digits) for value in points[place + offset]]} for name, kind, place in (
            ("used", "used", 2), ("asked", "asked", 0), ("available", "limit", 4))]
        for what, digits, offset in (("cpu", 3, 0), ("memory", None, 1))}
    width = (end - begin) / bins
    return {"times": [int(begin + width * (number + 0.5)) for number in range(bins)], **series,
            "requirements": requirement_rows(store, workflow_id, needs, means)}


def requirement_rows(store, workflow_id, needs, means):
    """What was asked for and used by each resource requirement, and what to change."""
    codes, rows = exit_codes(store, workflow_id), []
    jobs = dict(store.query("SELECT resource_requirements_id, count(*) FROM job WHERE workflow_id"
                            " = ? GROUP BY 1", (workflow_id,)))
    most = {row[0]: row[1:] for row in store.query(
        "SELECT j.resource_requirements_id, max(r.peak_memory_bytes), max(r.exec_time_minutes)"
        " * 60, count(*), total(r.return_code = ? AND r.status <> ?), total(r.return_code = ?)"
        " FROM result r CROSS JOIN latest_result l ON l.result_id = r.id CROSS JOIN job j ON j.id ="
        " r.job_id WHERE r.workflow_id = ? GROUP BY 1",
        (codes["memory"], COMPLETED, codes["time"], workflow_id))}
    for need, (cpus, memory, name, runtime_s) in needs.items():
        if not jobs.get(need):
            continue
        peak, longest, ended, of_memory, of_time = most.get(need, (0, 0, 0, 0, 0))
        used = means.get(need, (0, 0))[0]
        verdict, advice = requirement_advice(cpus, memory, name, runtime_s, peak or 0, longest or 0,
                                             ended, used, int(of_memory), int(of_time))
        rows.append({"name": name, "jobs": jobs[need], "cpus": cpus, "cpu_used": round(used, 3),
                     "peak": peak or 0, "memory": memory, "longest_s": longest or 0,
                     "runtime_s": runtime_s, "verdict": verdict, "advice": advice})
    return rows


def requirement_advice(cpus, memory, name, runtime_s, peak, longest, ended, used, of_memory,
                       of_time):
    """(status whose glyph it gets, sentence) on what to change of a resource requirement."""
    if not ended:
        return "uninitialized", "Nothing has run yet"
    if name == "default":
        return "completed", "Nothing was asked for, so nothing is limited"
    if of_memory or of_time:
        short = [f"{number:,} ran out of {what}" for number, what in (
            (of_memory, "memory"), (of_time, "time")) if number]
        ask = [format_bytes(1.5 * max(peak, memory))] if of_memory else []
        ask += [span(1.4 * max(longest, runtime_s))] if of_time else []
        return "failed", f"{' and '.join(short)}: ask {', '.join(ask)}"
    if cpus > 1 and 0 < used < 0.5 * cpus:
        return "pending_failed", f"Uses {used:.1f} of {cpus} CPUs: ask {max(1, math.ceil(used))}"
    if peak and peak < 0.25 * memory and memory > 2**30:
        return "pending_failed", (f"Used {format_bytes(peak)} at most: ask "
                                  f"{format_bytes(1.5 * peak)}, more jobs fit then")
    return "completed", "Fits"


# ==================================================================================================
# 7 Access
# ==================================================================================================
# Who asks, and what may they do? Passwords are compared with an htpasswd file. Its hashes are slow
# on purpose, so threads of their own compute them, never one that serves requests. Who may use a
# workflow: its owner, the groups it is shared with, and admins.

CRYPT_BUFFER = 131_232                    # bytes of struct crypt_data in an old glibc, the largest
BCRYPT_BYTES = 72                         # of a password that bcrypt looks at
BCRYPT_COST = 10                          # 50 ms; htpasswd -B takes 5
HASHES = {"$2": "bcrypt", "$5$": "SHA-256", "$6$": "SHA-512"}
OTHER_HASHES = {"$apr1$": "Apache's MD5", "$1$": "MD5", "{SHA}": "SHA-1"}
HASH_QUEUE = 1000                         # attempts that may wait for a hash, in all
LANE_QUEUE = 32                           # of one user name from one address: a short line that
                                          # is hard to join beats a long one for who tries again
FORGET_FAILURES_S = 60.0
LONGEST_DELAY_S = 2.0
REMEMBERED = 10_000                       # wrong attempts, failing lanes


# ---- password hashes

def libcrypt():
    """libxcrypt through ctypes, or None where there is none."""
    import ctypes
    for name in ("libcrypt.so.1", "libcrypt.so.2"):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name)
            library.crypt_r.restype = ctypes.c_char_p
            return library
    return None


def crypt_text(password, setting):
    """crypt(3) of a password under a setting (or a hash), b"" if this machine cannot.

    Raises MissingPackage when there is neither libxcrypt nor the bcrypt package.
    """
    library = libcrypt()
    if library:                           # it lets other threads run meanwhile
        import ctypes
        buffer = ctypes.create_string_buffer(CRYPT_BUFFER)
        made = library.crypt_r(password, setting, buffer) or b""
        if made.startswith(setting[:4]):
            return made
    if not setting.startswith(b"$2"):
        return b""
    try:
        import bcrypt
    except ImportError:
        raise MissingPackage("bcrypt", "password files") from None
    with contextlib.suppress(ValueError):
        return bcrypt.hashpw(password[:BCRYPT_BYTES], setting)
    return b""


def check_password(password, hashed):
    """Whether a password belongs to a hash."""
    import hmac
    data = password.encode()
    return b"\0" not in data and hmac.compare_digest(
        crypt_text(data, hashed.encode()), hashed.encode())


def hash_password(password, cost=BCRYPT_COST):
    """The bcrypt hash of a password, as `htpasswd -B` writes it. Raises UsageError."""
    import base64
    data = password.encode()
    if not password or "\0" in password or len(data) > BCRYPT_BYTES:
        raise UsageError(f"a password has 1 to {BCRYPT_BYTES} bytes and no NUL; this one has "
                         f"{len(data)} bytes")
    # 16 random bytes in bcrypt's own base64, of which the last character carries two bits.
    standard = base64.b64encode(os.urandom(16)).decode().rstrip("=")
    order = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    ours = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    salt = standard.translate(str.maketrans(order, ours))
    made = crypt_text(data, f"$2y${cost:02d}${salt}".encode()).decode()
    if len(made) != 60:
        raise TorcError("this machine's libcrypt has no bcrypt: python3 -m pip install bcrypt")
    return made


# ---- password files

class PasswordFile:
    """An htpasswd file: its lines as they are, and the users in them.

    path: the file; absent: False makes one that does not exist an error. Raises Unreachable with
    file and line for what cannot be read or used.
    """

    def __init__(self, path, absent=False):
        self.path = path
        self.users = {}
        try:
            with open(path, encoding="utf-8") as file:
                self.signature = self.look()
                self.lines = file.read().splitlines()
        except FileNotFoundError:
            if not absent:
                raise Unreachable(f"password file {path} does not exist: torc-htpasswd add --file "
                                  f"{path} USER makes it") from None
            self.signature, self.lines = None, []
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", error)
            raise Unreachable(f"password file {path}: {reason}") from None
        for number, line in enumerate(self.lines, 1):
            if line.strip() and not line.startswith("#"):
                self._take(line.strip(), f"password file {path}, line {number}")

    def _take(self, line, place):
        user, colon, hashed = line.partition(":")
        if not colon or not user:
            raise Unreachable(f"{place}: expected USER:HASH")
        if not hashed.startswith(tuple(HASHES)):
            kind = next((name for start, name in OTHER_HASHES.items() if hashed.startswith(start)),
                        "a plain or DES text")
            raise Unreachable(f"{place}: the password of {user} is stored as {kind}, which is too "
                              f"weak: htpasswd -B {self.path} {user} (or torc-htpasswd add) "
                              "makes a good one")
        self.users[user] = hashed

    def look(self):
        """What changes when the file does."""
        found = os.stat(self.path)
        return found.st_mtime_ns, found.st_size, found.st_ino

    def set(self, user, hashed):
        """Give a user a hash, in the user's line if there is one; None removes the user."""
        if not re.fullmatch(r"[^:#\s][^:\s]*", user):
            raise UsageError(f"{user!r} is no user name: no spaces, no colon, no # at its start")
        kept, done = [], hashed is None
        for line in self.lines:
            if line.partition(":")[0].strip() != user or line.startswith("#"):
                kept.append(line)
            elif not done:
                kept.append(f"{user}:{hashed}")
                done = True
        self.lines = kept if done else [*kept, f"{user}:{hashed}"]
        self.users.pop(user, None)
        if hashed is not None:
            self.users[user] = hashed

    def write(self):
        """Replace the file in one step, readable by nobody else (0600)."""
        write_private(self.path, "".join(line + "\n" for line in self.lines))


def write_private(path, text):
    """Replace a file in one step; 0600 from its first byte. Raises Unreachable."""
    path = os.path.realpath(path)         # a link stays a link
    temporary = f"{path}.{os.getpid()}.new"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise Unreachable(f"{path} cannot be written: {error.strerror}") from None


# ---- credentials of requests

def basic_credentials(header):
    """(user, password) of an Authorization header, None if it carries none (RFC 7617)."""
    import base64
    if not header or not header.startswith("Basic "):
        return None
    try:
        user, colon, password = base64.b64decode(header[6:], validate=True).decode().partition(":")
    except ValueError:
        return None
    return (user, password) if colon else None


class Verdict(NamedTuple):
    """What is known of a request's credentials."""

    state: str                            # nobody, known, wrong, busy, or unsure: must be hashed
    user: str | None = None
    digest: bytes = b""
    delay_s: float = 0.0                  # for a wrong one, before it is told


NOBODY = Verdict("nobody")


class Guess:
    """Credentials that wait for their hash to be computed."""

    def __init__(self, user, hashed, password):
        self.user, self.hashed, self.password = user, hashed, password
        self.callbacks = []


class Gate:
    """Judges Basic credentials by a password file, which is read again when it changes.

    required: requests without good credentials get 401. ttl_s: for how long a checked password is
    believed without a new hash. The cache holds keyed digests, never passwords.

    Hashes are computed in a few threads. Those who wait stand in lanes, one for each user name and
    address, that are served in turn: a flood of guesses delays its own lane only. A user whose
    password was once seen right costs no hash for any wrong one, since there is just one right one.
    """

    def __init__(self, path, required=False, ttl_s=60.0, warn=lambda text: None):
        import collections
        self.required, self.ttl_s, self.warn = required, ttl_s, warn
        self.file = self._read(path)
        self.key = os.urandom(32)
        self.proven = {}                  # user: (hash, digest of the password, believed until)
        self.refuted = collections.OrderedDict()     # digests of wrong credentials
        self.failures = collections.OrderedDict()    # lane: (number, time of the last)
        self.lanes = collections.OrderedDict()       # lane: (first attempts, those of known liars)
        self.attempts = {}                # digest: Guess that waits or is at work
        self.condition = threading.Condition()
        self.looked = time.monotonic()
        self.threads = 0

    # -- the file

    @staticmethod
    def _read(path):
        file = PasswordFile(path)
        if not file.users:
            raise Unreachable(f"password file {path} has no users: torc-htpasswd add --file {path} "
                              "USER adds one")
        return file

    def reload(self):
        """Read the file again. Raises Unreachable, and keeps the users it had."""
        fresh = self._read(self.file.path)
        with self.condition:
            self.file = fresh
            self.proven = {user: entry for user, entry in self.proven.items()
                           if fresh.users.get(user) == entry[0]}
            self.refuted.clear()
        return len(fresh.users)

    def _look_at_file(self, now):
        """Read it again if it has changed, looking at most once a second."""
        if now - self.looked < 1:
            return
        self.looked = now
        try:
            if self.file.look() != self.file.signature:
                self.reload()
                self.warn(f"password file {self.file.path} has changed: "
                          f"{len(self.file.users)} users")
        except (OSError, Unreachable) as error:
            self.file.signature = None    # complained about once, until it changes again
            with contextlib.suppress(OSError):
                self.file.signature = self.file.look()
                self.warn(f"the users stay as they were: {error}")

    # -- judging

    def _digest(self, user, hashed, password):
        import hmac
        data = password.encode()[:BCRYPT_BYTES if hashed.startswith("$2") else None]
        return hmac.digest(self.key, compact([user, hashed]).encode() + b"\0" + data, "sha256")

    def judge(self, header, address):
        """The Verdict on an Authorization header from an address; never computes a hash."""
        import hmac
        credentials = basic_credentials(header)
        if not credentials:
            return NOBODY
        user, password = credentials
        now = time.monotonic()
        self._look_at_file(now)
        hashed = self.file.users.get(user)
        if hashed is None:                # names are no secret where people share a machine
            return self.wrong(user, address, now)
        digest = self._digest(user, hashed, password)
        with self.condition:
            proven = self.proven.get(user)
            if proven and proven[0] == hashed:
                if not hmac.compare_digest(proven[1], digest):
                    return self.wrong(user, address, now)
                if now < proven[2]:
                    return Verdict("known", user)
            if digest in self.refuted:
                return self.wrong(user, address, now)
        return Verdict("unsure", user, digest)

    def wrong(self, user, address, now):
        """A Verdict for wrong credentials; the more of them, the later it is told."""
        lane = address, user
        with self.condition:              # may be ours already: its lock is reentrant
            number, last = self.failures.pop(lane, (0, now))
            number = number + 1 if now - last < FORGET_FAILURES_S else 1
            self.failures[lane] = number, now
            if len(self.failures) > REMEMBERED:
                self.failures.popitem(last=False)
        return Verdict("wrong", None, b"", min(LONGEST_DELAY_S, 0.05 * 2**min(number, 10)))

    # -- hashing

    def ask(self, header, address, digest, liar, callback):
        """Have credentials checked; callback(Verdict) comes from another thread.

        digest: of judge(). liar: the connection has sent wrong ones before, so others go first.
        """
        import collections
        user, password = basic_credentials(header)
        hashed = self.file.users.get(user)
        with self.condition:
            guess = self.attempts.get(digest)
            waiting = sum(map(len, self.lanes.get((address, user), ())))
            if not guess and hashed is not None and waiting < LANE_QUEUE and (
                    len(self.attempts) < HASH_QUEUE):
                guess = self.attempts[digest] = Guess(user, hashed, password)
                lane = self.lanes.setdefault((address, user), (collections.deque(),
                                                               collections.deque()))
                lane[bool(liar)].append((digest, address))
                if self.threads < max(1, min(4, len(os.sched_getaffinity(0)) // 2)):
                    self.threads += 1
                    threading.Thread(target=self._hash, daemon=True).start()
                self.condition.notify()
            if guess:                     # the same may be asked already
                guess.callbacks.append(callback)
                return
        callback(Verdict("busy"))

    def _hash(self):
        """Compute hashes, a lane after the other (a thread)."""
        while True:
            with self.condition:
                while not self.lanes:
                    self.condition.wait()
                name, lane = self.lanes.popitem(last=False)
                digest, address = (lane[0] or lane[1]).popleft()
                if any(lane):
                    self.lanes[name] = lane
                attempt = self.attempts[digest]
            try:
                good = check_password(attempt.password, attempt.hashed)
            except TorcError as error:
                self.warn(str(error))
                good = False
            now = time.monotonic()
            with self.condition:
                del self.attempts[digest]
                if good:
                    self.proven[attempt.user] = attempt.hashed, digest, now + self.ttl_s
                else:
                    self.refuted[digest] = True
                    if len(self.refuted) > REMEMBERED:
                        self.refuted.popitem(last=False)
            for callback in attempt.callbacks:
                callback(Verdict("known", attempt.user) if good
                         else self.wrong(attempt.user, address, now))


# ---- groups

ADMIN_GROUP = 1                           # made by the schema, its members by the server's options


class Access(NamedTuple):
    """How a server decides what its users may do; enforced is False without access control."""

    gate: Gate | None = None
    enforced: bool = False


def set_admins(store, admins):
    """Make the members of the group `admin` those named, with role admin."""
    with store.transaction():
        store.execute(f"DELETE FROM user_group_membership WHERE group_id = {ADMIN_GROUP}"
                      f" AND user_name NOT IN (SELECT value FROM json_each(?))", (compact(admins),))
        for name in admins:
            store.execute("INSERT OR IGNORE INTO user_group_membership (user_name, group_id, role)"
                          f" VALUES (?, {ADMIN_GROUP}, 'admin')", (name,))


def is_admin(store, user, group_id=ADMIN_GROUP):
    """Whether a user is a system admin, or has the role admin in a group."""
    return bool(user) and store.one(
        "SELECT EXISTS (SELECT 1 FROM user_group_membership WHERE user_name = ? AND (group_id ="
        f" {ADMIN_GROUP} OR (group_id = ? AND role = 'admin')))", (user, group_id))[0] == 1


USABLE = ("(t.user = ? OR t.id IN (SELECT w.workflow_id FROM workflow_access_group w JOIN"
          " user_group_membership m ON m.group_id = w.group_id WHERE m.user_name = ?))")


def has_access(store, workflow_id, user):
    """Whether a user owns a workflow or shares it by a group; admin power does not count."""
    return bool(user) and store.one(
        f"SELECT EXISTS (SELECT 1 FROM workflow t WHERE t.id = ? AND {USABLE})",
        (workflow_id, user, user))[0] == 1


def require_access(store, workflow_id, user):
    """Raise Forbidden unless the user may use the workflow; a missing one is not our question."""
    if store.one("SELECT 1 FROM workflow WHERE id = ?", (workflow_id,)) and not (
            has_access(store, workflow_id, user) or is_admin(store, user)):
        raise Forbidden(f"{user or 'anonymous'} may not use workflow {workflow_id}: its owner can "
                        "share it with a group (torc access-groups add-workflow)")


# ==================================================================================================
# 8 API
# ==================================================================================================
# Every operation is a plain function of a Request and the URL's values; it returns what becomes
# JSON and raises our errors. Nothing here knows HTTP: the server and LocalClient both call it.
# Order of checks: query and body, existence, values, work.


class Request(NamedTuple):
    """One API request, free of HTTP machinery."""

    store: Store
    user: str | None                      # authenticated user, None for nobody
    query: dict                           # parameter: list of texts
    body: Any                             # decoded JSON, None without a body
    now: float                            # seconds since the epoch
    urls: tuple = ()                      # where the server can be reached, empty without one
    access: Access = Access()
    nobody: str = "anonymous"             # or "unknown" if there were wrong credentials
    streams: bool = False                 # whether the caller can take a Subscription

    @property
    def subject(self):
        """The user's name for events and messages."""
        return self.user or self.nobody

    def param(self, name, kind="str", default=None):
        """A query parameter as str, int or bool. Raises BadRequest."""
        values = self.query.get(name)
        if not values:
            return default
        if len(values) > 1:
            raise BadRequest(f"query parameter {name} is given {len(values)} times")
        text = values[0]
        if kind == "int" and re.fullmatch(r"[-+]?\d{1,18}", text):
            return int(text)
        if kind == "bool" and text in ("true", "false"):
            return text == "true"
        if kind == "status" and text in STATUS_OF_NAME:
            return STATUS_OF_NAME[text]
        if kind == "statuses" and all(one in STATUS_OF_NAME for one in text.split(",")):
            return compact([STATUS_OF_NAME[one] for one in text.split(",")])
        if kind == "str":
            return text
        raise BadRequest(f"query parameter {name}={text!r} is not {TYPE_NAMES[kind]}")

    def need(self, name, kind="int"):
        """A query parameter that must be there. Raises BadRequest."""
        value = self.param(name, kind)
        if value is None:
            raise BadRequest(f"query parameter {name} is missing")
        return value

    def page(self, clamp=False):
        """offset, limit, sort_by and reverse_sort. Raises BadRequest, Internal."""
        limit = self.param("limit", "int", MAX_LIMIT)
        if limit > MAX_LIMIT and not clamp:
            raise Internal(f"limit {limit} is larger than {MAX_LIMIT}")
        return Page(self.param("offset", "int", 0), min(limit, MAX_LIMIT),
                    self.param("sort_by"), self.param("reverse_sort", "bool", False))


TYPE_NAMES = {"int": "an integer", "float": "a number", "str": "a string", "bool": "true or false",
              "status": "a job status", "statuses": "a job status, or several with commas",
              "ints": "a list of integers", "any": "a value",
              "echo": "a string",
              "dict": "an object", "list": "a list"}


def has_type(value, kind):
    """Whether a JSON value is of a field's type; 1.0 is no integer, true is no number."""
    if kind == "int":
        return type(value) is int and -2**63 <= value < 2**63
    if kind == "float":
        return type(value) in (int, float)
    if kind == "ints":
        return isinstance(value, list) and all(has_type(item, "int") for item in value)
    if kind == "status":
        return isinstance(value, str) and value in STATUS_OF_NAME
    return kind == "any" or isinstance(value, {"str": str, "echo": str, "bool": bool,
                                               "dict": dict, "list": list}[kind])


def check_body(body, wanted, partial=False):
    """The known fields of a JSON object that have a value. Raises BadShape.

    wanted: Fields. partial: required ones may be absent, as in an update.
    """
    if not isinstance(body, dict):
        raise BadShape(f"the body is {type(body).__name__}, not a JSON object")
    values = {}
    for field in wanted:
        value = body.get(field.name)
        if value is None:
            if field.required and not partial:
                raise BadShape(f"missing field `{field.name}`")
        elif not has_type(value, field.type):
            raise BadShape(f"field `{field.name}`: {value!r:.80} is not {TYPE_NAMES[field.type]}")
        else:
            values[field.name] = value
    return values


def require_workflow(store, workflow_id):
    """Raise NotFound unless the workflow exists."""
    workflow_row(store, workflow_id, "id")


# ---- the six operations that most kinds share

class Filter(NamedTuple):
    """A list's filter beyond equality: the parameter's type, the SQL condition, the value that
    stands for an absent parameter."""

    type: str
    condition: str
    default: Any = None


CONTAINS = "instr(lower(t.{0}), lower(?)) > 0"
SEARCHED = "(t.{} LIKE ? ESCAPE '\\' OR t.{} LIKE ? ESCAPE '\\' OR t.{} LIKE ? ESCAPE '\\')"
FILTERS = {
    "workflow": {"description": Filter("str", CONTAINS.format("description")),
                 "is_archived": Filter("bool", "t.is_archived = ?")},
    "job": {"status": Filter("statuses", f"t.status IN {IDS}"),
            "needs_file_id": Filter(
                "int", "t.id IN (SELECT job_id FROM job_input_file WHERE file_id = ?)"),
            "upstream_job_id": Filter(
                "int", "t.id IN (SELECT job_id FROM job_dependency WHERE depends_on_job_id = ?)"),
            "active_compute_node_id": Filter("int", "t.compute_node_id = ?")},
    "file": {"produced_by_job_id": Filter(
                 "int", "t.id IN (SELECT file_id FROM job_output_file WHERE job_id = ?)"),
             "is_output": Filter("bool", "(NOT ? OR EXISTS (SELECT 1 FROM job_output_file o WHERE"
                                         " o.file_id = t.id))")},
    "user_data": {"name": Filter("str", CONTAINS.format("name")),
                  "consumer_job_id": Filter(
                      "int", "t.id IN (SELECT user_data_id FROM job_input_user_data"
                             " WHERE job_id = ?)"),
                  "producer_job_id": Filter(
                      "int", "t.id IN (SELECT user_data_id FROM job_output_user_data"
                             " WHERE job_id = ?)")},
    "resource_requirements": {"runtime": Filter("int", "t.runtime_s = ?"),
                              "job_id": Filter("int", "t.id = (SELECT resource_requirements_id"
                                                      " FROM job WHERE id = ?)")},
    "compute_node": {"scheduled_compute_node_id": Filter(
        "int", "json_extract(t.scheduler, '$.scheduler_id') = ?")},
    "scheduled_compute_node": {
        "scheduler_id": Filter("str", "t.scheduler_id = CAST(? AS INTEGER)"),
        "scheduler_config_id": Filter("str", "t.scheduler_config_id = CAST(? AS INTEGER)")},
    "result": {"all_runs": Filter(
        "bool", "(? OR t.id IN (SELECT result_id FROM latest_result))", False)},
    "event": {"after_timestamp": Filter("int", "t.timestamp > ?")},
}


def like(text):
    """A text as a pattern of LIKE, which is twice as fast as comparing lower-case copies."""
    return "%" + re.sub(r"([\\%_])", r"\\\1", text) + "%"


def conditions(request, kind):
    """The SQL condition and parameters of a list request's filters."""
    found = {name: Filter(kind.field(name).type, f"t.{name} = ?") for name in kind.filters.split()}
    found.update(FILTERS.get(kind.table, {}))
    where, params = [], []
    for name, wanted in found.items():
        value = request.param(name, wanted.type, wanted.default)
        if value is not None:
            where.append(wanted.condition)
            params.append(value)
    return where, params


def list_records(request, kind, workflow_id=None, without=(), clamp=False):
    """The records of a workflow, filtered and paged."""
    if workflow_id is None:
        workflow_id = request.need("workflow_id")
    page = request.page(clamp)
    where, params = conditions(request, kind)
    require_workflow(request.store, workflow_id)
    return listing(request.store, kind, page, " AND ".join(["t.workflow_id = ?", *where]),
                   [workflow_id, *params], without)


def create_record(request, kind):
    """Store a record; the answer echoes the request with the new id."""
    values = check_body(request.body, kind.fields)
    require_workflow(request.store, values["workflow_id"])
    with request.store.transaction():
        return {**values, "id": add(request.store, kind, values)}


def get_record(request, kind, record_id):
    """One record by id."""
    return fetch(request.store, kind, record_id)


def update_record(request, kind, record_id):
    """Change the fields given; absent ones keep their value."""
    values = check_body(request.body, kind.fields, partial=True)
    with request.store.transaction():
        fetch(request.store, kind, record_id)
        change(request.store, kind, record_id, values)
    return fetch(request.store, kind, record_id)


def delete_record(request, kind, record_id):
    """Delete a record and answer what it was."""
    with request.store.transaction():
        record = fetch(request.store, kind, record_id)
        if kind.table == "job":
            delete_jobs(request.store, record["workflow_id"], [record_id])
        else:
            remove(request.store, kind, record_id)
            if kind.table == "resource_requirements":
                settle_all(request.store, record["workflow_id"])
            request.store.news(record.get("workflow_id", record_id))
    return record


def clear_records(request, kind):
    """Delete all records of a kind in a workflow; `count` is what clients read."""
    workflow_id = request.need("workflow_id")
    require_workflow(request.store, workflow_id)
    with request.store.transaction():
        number = request.store.execute(f"DELETE FROM {kind.table} WHERE workflow_id = ?",
                                       (workflow_id,))
        reshaped(request.store, workflow_id)
        request.store.news(workflow_id)
    return {"count": number, "deleted_count": number,
            "message": f"deleted {number} {kind.name} records"}


def delete_jobs(store, workflow_id, job_ids):
    """In a transaction: delete jobs; what waited for them waits no more."""
    for job_id in job_ids:
        job = job_row(store, job_id)
        if job.status not in COMPLETE_SET:
            shift_dependents(store, [job_id], -1)
        remove(store, KINDS["job"], job_id)
    settle_blocked(store, workflow_id)
    reshaped(store, workflow_id)
    store.news(workflow_id)


def settle_blocked(store, workflow_id):
    """In a transaction: free or cancel blocked jobs that wait for nothing any more."""
    settle(store, workflow_id, [row[0] for row in store.query(
        f"SELECT id FROM job WHERE workflow_id = ? AND status = {BLOCKED} AND unfinished = 0",
        (workflow_id,))])


def settle_all(store, workflow_id):
    """In a transaction: jobs have vanished by a cascade; put the rest in order."""
    recount(store, workflow_id)
    reshaped(store, workflow_id)
    settle_blocked(store, workflow_id)


# ---- server

def ping(request):
    """Whether the server answers."""
    return {"status": "ok"}


def version(request):
    """Versions of program and API, and which operations of ours exist."""
    answer = {"version": f"{SPOKEN_VERSION} ({own_hash()})", "api_version": API_VERSION,
              "git_hash": own_hash(), "server": f"torc.py {VERSION}",
              "extensions": list(EXTENSIONS)}
    if request.access.enforced:
        del answer["git_hash"]            # as upstream
    return answer


def server_info(request):
    """Which database this is and where it can be reached (ours)."""
    return {"id": request.store.id, "version": VERSION, "urls": list(request.urls),
            "auth_required": bool(request.access.gate and request.access.gate.required)}


# ---- workflows

def create_workflow(request):
    """Store a workflow and its default resource requirements."""
    values = check_body(request.body, KINDS["workflow"].fields)
    with request.store.transaction():
        return insert_workflow(request, values)


DEFAULT_REQUIREMENTS = {"name": "default", "num_cpus": 1, "num_gpus": 0, "num_nodes": 1,
                        "memory": "1m", "runtime": "P0DT1M"}


def insert_workflow(request, values):
    """In a transaction: the workflow's row and its default requirements; returns the echo."""
    values = {**values, "user": request.user or values["user"]}
    for name in ("id", "status_id"):
        values.pop(name, None)
    timestamp = iso_time(request.now)
    names = [field.name for field in columns(KINDS["workflow"])
             if field.name in values and not field.server]
    workflow_id = request.store.insert(
        f"INSERT INTO workflow (timestamp, {', '.join(names)}) VALUES"
        f" (?{', ?' * len(names)})", [timestamp] + [values[name] for name in names])
    insert_requirements(request.store, workflow_id, [DEFAULT_REQUIREMENTS])
    return {**values, "id": workflow_id, "status_id": workflow_id, "timestamp": timestamp}


def show_workflow(store, workflow_id):
    """A workflow as clients see it."""
    return {**fetch(store, KINDS["workflow"], workflow_id), "status_id": workflow_id}


def get_workflow(request, workflow_id):
    """One workflow; include_counts adds how far it is (ours)."""
    workflow = show_workflow(request.store, workflow_id)
    if request.param("include_counts", "bool", False):
        workflow.update(progress(request.store, [workflow_id])[workflow_id])
    return workflow


WORKFLOW_STATUS = fields("run_id:int! is_canceled:bool! is_archived:bool"
                         " has_detected_need_to_run_completion_script:bool")


def list_workflows(request):
    """All workflows; sorting by the status columns needs the is_archived filter, as upstream.

    Ours: search (in name, project and description), all_users=false (only those of the user whose
    name is given), include_counts.
    """
    page = request.page()
    where, params = conditions(request, KINDS["workflow"])
    if request.param("search"):
        where.append(SEARCHED.format("name", "project", "description"))
        params += [like(request.param("search"))] * 3
    if not request.param("all_users", "bool", True) and request.user:
        where.append("t.user = ?")
        params.append(request.user)
    if request.access.enforced and not is_admin(request.store, request.user):
        where.append(USABLE)
        params += [request.user] * 2      # nobody's name is NULL, which equals nothing
    answer = listing(request.store, KINDS["workflow"], page, " AND ".join(where) or "1", params)
    counted = request.param("include_counts", "bool", False)
    far = progress(request.store, [one["id"] for one in answer["items"]]) if counted else {}
    for workflow in answer["items"]:
        workflow.update(status_id=workflow["id"], **far.get(workflow["id"], {}))
    return answer


def update_workflow(request, workflow_id):
    """Change the fields given."""
    values = check_body(request.body, KINDS["workflow"].fields, partial=True)
    with request.store.transaction():
        owner = workflow_row(request.store, workflow_id, "user")[0]
        if values.get("user", owner) != owner and request.user != owner:
            require_admin(request)        # a group that shares a workflow cannot take it over
        change(request.store, KINDS["workflow"], workflow_id, values)
    return show_workflow(request.store, workflow_id)


def delete_workflow(request, workflow_id):
    """Delete a workflow and everything below it."""
    with request.store.transaction():
        record = show_workflow(request.store, workflow_id)
        # Jobs first: the cascades then meet empty tables instead of searching for each parent.
        request.store.execute("DELETE FROM job WHERE workflow_id = ?", (workflow_id,))
        request.store.news(workflow_id)
        remove(request.store, KINDS["workflow"], workflow_id)
    return record


def workflow_status(store, workflow_id):
    """Run number and flags of a workflow."""
    names = [field.name for field in WORKFLOW_STATUS]
    row = workflow_row(store, workflow_id, ", ".join(names))
    return {"id": workflow_id, **{field.name: bool(value) if field.type == "bool" else value
                                  for field, value in zip(WORKFLOW_STATUS, row)}}


def get_workflow_status(request, workflow_id):
    """Run number and flags."""
    return workflow_status(request.store, workflow_id)


def update_workflow_status(request, workflow_id):
    """Set run number and flags; a flag left out becomes false, as upstream."""
    values = check_body(request.body, WORKFLOW_STATUS)
    with request.store.transaction():
        require_workflow(request.store, workflow_id)
        request.store.execute(
            "UPDATE workflow SET run_id = ?, is_canceled = ?, is_archived = ?,"
            " has_detected_need_to_run_completion_script = ? WHERE id = ?",
            [values.get(field.name, False) for field in WORKFLOW_STATUS] + [workflow_id])
        request.store.news(workflow_id)
    return {**values, "id": workflow_id}


def is_workflow_complete(request, workflow_id):
    """Whether all is done, and the flags that tell how."""
    canceled, script = workflow_row(request.store, workflow_id, "is_canceled,"
                                    " has_detected_need_to_run_completion_script")
    return {"is_complete": is_complete(request.store, workflow_id), "is_canceled": bool(canceled),
            "needs_to_run_completion_script": bool(script)}


def is_workflow_uninitialized(request, workflow_id):
    """Whether every job is uninitialized or disabled."""
    require_workflow(request.store, workflow_id)
    return {"is_uninitialized": not request.store.one(
        f"SELECT EXISTS (SELECT 1 FROM job WHERE workflow_id = ? AND status NOT IN"
        f" ({UNINITIALIZED}, {DISABLED}))", (workflow_id,))[0]}


def cancel(request, workflow_id):
    """Cancel a workflow: no more claims, running jobs are ended by their runners."""
    with request.store.transaction():
        cancel_workflow(request.store, workflow_id, request.subject, request.now)
    return workflow_status(request.store, workflow_id)


def reset_status(request, workflow_id):
    """Clear a workflow's flags."""
    force = request.param("force", "bool", False)
    with request.store.transaction():
        reset_workflow(request.store, workflow_id, force, request.subject, request.now)
    return workflow_status(request.store, workflow_id)


def reset_job_status(request, workflow_id):
    """Jobs back to uninitialized: all, or the failed ones and what lies downstream of them."""
    failed_only = request.param("failed_only", "bool", False)
    with request.store.transaction():
        require_workflow(request.store, workflow_id)
        updated = reset_jobs(request.store, workflow_id, failed_only)
        store_event(request.store, workflow_id, request.now, {
            "category": "user_action", "action": "reset_job_status",
            "user": request.subject, "workflow_id": workflow_id,
            "failed_only": failed_only, "updated_count": updated})
    answer = {"workflow_id": workflow_id, "updated_count": updated, "status": "uninitialized"}
    return {**answer, "reset_type": "failed_only"} if failed_only else answer


def initialize(request, workflow_id):
    """Derive dependencies and make jobs blocked or ready. Upstream: initialize_jobs."""
    only = request.param("only_uninitialized", "bool", False)
    clear = request.param("clear_ephemeral_user_data", "bool", False)
    message = f"initialized the jobs of workflow {workflow_id}"
    kind = "workflow_started" if only else "workflow_reinitialized"      # as upstream names them
    with request.store.transaction():
        initialize_jobs(request.store, workflow_id, only, clear)
        if request.store.is_heard(workflow_id):
            request.store.tell(workflow_id, kind, "info", {
                "category": "workflow", "type": kind, "user": request.subject, "message": message})
    return {"message": message}


def process_changed_job_inputs(request, workflow_id):
    """Jobs whose inputs differ from those of the last initialization become uninitialized."""
    dry_run = request.param("dry_run", "bool", False)
    with request.store.transaction():
        require_workflow(request.store, workflow_id)
        changed = changed_jobs(request.store, workflow_id)
        if not dry_run and changed:
            for job_id, _ in changed:
                leave_complete(request.store, job_row(request.store, job_id), UNINITIALIZED)
            disown(request.store, workflow_id)
    return {"reinitialized_jobs": [name for _, name in changed]}


# ---- a whole specification at once

SPEC_LISTS = {"files": "file", "user_data": "user_data",
              "resource_requirements": "resource_requirements",
              "failure_handlers": "failure_handler", "slurm_schedulers": "slurm_scheduler"}
SPEC_JOB = fields("name:str! command:str! invocation_script:str priority:int"
                  " cancel_on_blocking_job_failure:bool supports_termination:bool stdio:str"
                  " resource_requirements:int scheduler:int failure_handler:int depends_on:ints"
                  " input_files:ints output_files:ints input_user_data:ints output_user_data:ints")
SPEC_RELATIONS = {"input_files": ("files", "input_file_ids"),
                  "output_files": ("files", "output_file_ids"),
                  "input_user_data": ("user_data", "input_user_data_ids"),
                  "output_user_data": ("user_data", "output_user_data_ids")}


def create_from_spec(request):
    """A workflow with all its records from one body, in one transaction (ours).

    Records refer to each other by index into the body's lists. Answers id, name and the number of
    jobs. Raises BadShape for what a checked specification never has.
    """
    body = request.body
    if not isinstance(body, dict) or not isinstance(body.get("workflow"), dict):
        raise BadShape("missing field `workflow`")
    for name in (*SPEC_LISTS, "jobs", "actions"):
        if not isinstance(body.setdefault(name, []), list):
            raise BadShape(f"field `{name}` is not a list")
    values = check_body(body["workflow"], KINDS["workflow"].fields)
    jobs = [check_body(job, SPEC_JOB) for job in body["jobs"]]
    store = request.store
    with store.transaction():
        workflow = insert_workflow(request, values)
        workflow_id = workflow["id"]
        ids = {name: insert_spec_list(store, workflow_id, name, body[name]) for name in SPEC_LISTS}
        ids["jobs"] = insert_jobs(store, workflow_id, jobs_by_id(jobs, ids, next_id(store, "job")))
        for action in body["actions"]:
            insert_spec_action(store, workflow_id, action, ids)
    return {"id": workflow_id, "name": workflow["name"], "jobs": len(jobs)}


def next_id(store, table):
    """In a transaction: the id that the next insert into a table gets; ids are never reused."""
    row = store.one("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,))
    return (row[0] if row else 0) + 1


def insert_spec_list(store, workflow_id, name, records):
    """In a transaction: insert the records of one list of a specification; returns their ids."""
    kind = KINDS[SPEC_LISTS[name]]
    wanted = [field._replace(required=field.required and field.name != "workflow_id")
              for field in kind.fields]
    checked = [check_body(record, wanted) for record in records]
    first = next_id(store, kind.table)
    if kind.table == "resource_requirements":
        insert_requirements(store, workflow_id, checked)
    else:
        given = [field for field in columns(kind) if not field.server
                 and field.name != "workflow_id"
                 and any(field.name in record for record in checked)]
        names = "".join(f", {field.name}" for field in given)
        rows = [(workflow_id, *(to_column(field, record.get(field.name, DEFAULTS.get(field.name)))
                                for field in given)) for record in checked]
        store.insert_many(f"INSERT INTO {kind.table} (workflow_id{names})", len(given) + 1, rows)
    return range(first, first + len(records))


DEFAULTS = {"is_ephemeral": False}        # of columns that are NOT NULL and may be left out


def at(ids, index, what):
    """The id at an index of a list of ids. Raises BadShape."""
    if not 0 <= index < len(ids):
        raise BadShape(f"{what}: index {index} is outside its list of {len(ids)}")
    return ids[index]


def jobs_by_id(jobs, ids, first):
    """Jobs of a specification with ids in place of indexes, as insert_jobs takes them."""
    job_ids = range(first, first + len(jobs))
    for job in jobs:
        for name, key in (("resource_requirements", "resource_requirements_id"),
                          ("failure_handler", "failure_handler_id"),
                          ("scheduler", "scheduler_id")):
            if name in job:
                source = name if name == "resource_requirements" else {
                    "scheduler": "slurm_schedulers"}.get(name, "failure_handlers")
                job[key] = at(ids[source], job.pop(name), name)
        if "depends_on" in job:
            job["depends_on_job_ids"] = [at(job_ids, index, "depends_on")
                                         for index in job.pop("depends_on")]
        for name, (source, key) in SPEC_RELATIONS.items():
            if name in job:
                job[key] = [at(ids[source], index, name) for index in job.pop(name)]
    return jobs


def insert_spec_action(store, workflow_id, action, ids):
    """In a transaction: insert an action of a specification, indexes turned into ids."""
    action = check_body(action, fields("trigger_type:str! action_type:str! action_config:dict!"
                                       " persistent:bool jobs:ints"))
    config = dict(action["action_config"])
    if "scheduler" in config:
        config["scheduler_id"] = at(ids["slurm_schedulers"], config.pop("scheduler"), "scheduler")
    action["action_config"] = config
    if "jobs" in action:
        action["job_ids"] = [at(ids["jobs"], index, "jobs") for index in action.pop("jobs")]
    check_action(action)
    add_action(store, workflow_id, action)


# ---- jobs

JOB_COLUMNS = ("id", "workflow_id", "name", "command", "invocation_script",
               "cancel_on_blocking_job_failure", "supports_termination",
               "resource_requirements_id", "scheduler_id", "failure_handler_id", "priority",
               "stdio", "unfinished")


def insert_jobs(store, workflow_id, jobs):
    """In a transaction: insert checked jobs with their relations; returns their consecutive ids.

    Raises Invalid for a negative priority. Unknown ids are refused by the store.
    """
    first = next_id(store, "job")
    default = store.one("SELECT min(id) FROM resource_requirements WHERE workflow_id = ?"
                        " AND name = 'default'", (workflow_id,))[0]
    rows, relations = [], {name: [] for name in RELATIONS}
    for job_id, job in enumerate(jobs, first):
        if job.get("priority", 0) < 0:
            raise Invalid(f"priority {job['priority']} of job {job['name']!r} is negative")
        waits = 0
        for name, pairs in relations.items():
            if job.get(name):
                distinct = set(job[name])
                pairs += [(job_id, other) for other in distinct]
                if name == "depends_on_job_ids":
                    waits = len(distinct)
        rows.append((job_id, workflow_id, job["name"], job["command"],
                     job.get("invocation_script"), job.get("cancel_on_blocking_job_failure", True),
                     job.get("supports_termination", False),
                     job.get("resource_requirements_id", default), job.get("scheduler_id") or None,
                     job.get("failure_handler_id") or None, job.get("priority", 0),
                     job.get("stdio"), waits))
    store.insert_many(f"INSERT INTO job ({', '.join(JOB_COLUMNS)})", len(JOB_COLUMNS), rows)
    for name, pairs in relations.items():
        table, mine, theirs = RELATIONS[name]
        store.insert_many(f"INSERT INTO {table} ({mine}, {theirs})", 2, sorted(pairs))
    if store.one("SELECT EXISTS (SELECT 1 FROM job WHERE workflow_id = ? AND status IN"
                 f" {COMPLETE})", (workflow_id,))[0]:
        recount(store, workflow_id)       # some dependencies may have ended already
    reshaped(store, workflow_id)
    store.news(workflow_id)
    return range(first, first + len(jobs))


def created_job(values, job_id, default):
    """The echo of a job that was created."""
    return {"resource_requirements_id": default, **values, "id": job_id, "status": "uninitialized"}


def create_jobs(request, bodies):
    """Insert jobs of one workflow; returns their echoes."""
    jobs = [check_body(body, KINDS["job"].fields) for body in bodies]
    if not jobs:
        return []
    if len(jobs) > MAX_LIMIT:
        raise Internal(f"{len(jobs)} jobs in one request: at most {MAX_LIMIT}")
    workflow_id = jobs[0]["workflow_id"]
    if any(job["workflow_id"] != workflow_id for job in jobs):
        raise Invalid("the jobs belong to different workflows")
    require_workflow(request.store, workflow_id)
    for job in jobs:
        for name in ("id", "attempt_id"):
            job.pop(name, None)
    with request.store.transaction():
        ids = insert_jobs(request.store, workflow_id, jobs)
        default = request.store.one("SELECT min(id) FROM resource_requirements WHERE"
                                    " workflow_id = ? AND name = 'default'", (workflow_id,))[0]
    return [created_job(job, job_id, default) for job, job_id in zip(jobs, ids)]


def create_job(request):
    """Create one job, uninitialized."""
    return create_jobs(request, [request.body])[0]


def create_bulk_jobs(request):
    """Create many jobs of one workflow, all or none."""
    if not isinstance(request.body, dict) or not isinstance(request.body.get("jobs"), list):
        raise BadShape("missing field `jobs`")
    return {"jobs": create_jobs(request, request.body["jobs"])}


def with_relations(store, jobs):
    """Add the lists of related ids, each sorted and left out when empty, to job records."""
    by_id = {job["id"]: job for job in jobs}
    sql = " UNION ALL ".join(
        f"SELECT '{name}' AS name, {mine} AS job, {theirs} AS other FROM {table}"
        f" WHERE {mine} IN {IDS}"
        for name, (table, mine, theirs) in RELATIONS.items()) + " ORDER BY name, job, other"
    params = [compact(list(by_id))] * len(RELATIONS)
    rows = store.query(sql, params) if len(jobs) < 100 else store.bulk(sql, 3, params)
    for name, job_id, other in rows:
        by_id[job_id].setdefault(name, []).append(other)
    return jobs


def show_job(store, job_id):
    """A job as clients see it, relations included."""
    return with_relations(store, [fetch(store, KINDS["job"], job_id)])[0]


def get_job(request, job_id):
    """One job with its relations; include_results adds how it ended (ours)."""
    job = show_job(request.store, job_id)
    if request.param("include_results", "bool", False):
        job.update(job_views(request.store, [job_id], request.now)[job_id],
                   **job_details(request.store, job_id))
    return job


def list_jobs(request):
    """Jobs of a workflow; include_relationships adds the lists of related ids.

    Ours: several statuses (status=failed,terminated), search (in name and command), family,
    include_results, and sort_by start, ran, memory or host.
    """
    relations = request.param("include_relationships", "bool", False)
    results = request.param("include_results", "bool", False)
    workflow_id, page, store = request.need("workflow_id"), request.page(), request.store
    where, params = conditions(request, KINDS["job"])
    require_workflow(store, workflow_id)
    where, params = ["t.workflow_id = ?", *where], [workflow_id, *params]
    if request.param("search"):
        where.append("(t.name LIKE ? ESCAPE '\\' OR t.command LIKE ? ESCAPE '\\')")
        params += [like(request.param("search"))] * 2
    if request.param("family"):
        where.append(f"t.id IN {IDS}")
        params.append(compact(family_members(store, workflow_id, request.param("family"))))
    if page.sort_by in JOB_ORDERS:
        answer = job_page(store, page, " AND ".join(where), params, request.now)
    else:
        answer = listing(store, KINDS["job"], page, " AND ".join(where), params)
    if relations:
        with_relations(store, answer["items"])
    if results:
        views = job_views(store, [job["id"] for job in answer["items"]], request.now)
        for job in answer["items"]:
            job.update(views[job["id"]])
    return answer


LOCKED = ("name", "command", "depends_on_job_ids")
IMMUTABLE = tuple(name for name in RELATIONS if name not in LOCKED)


def update_job(request, job_id):
    """Change a job: some fields only while it is uninitialized, relations never.

    Values equal to the stored ones are always fine.
    """
    values = check_body(request.body, KINDS["job"].fields, partial=True)
    store = request.store
    with store.transaction():
        job = show_job(store, job_id)
        values = {name: value for name, value in values.items()
                  if (sorted(value) if isinstance(value, list) else value)
                  != job.get(name, [] if isinstance(value, list) else None)}
        check_update(job, values)
        if values.get("status") == "disabled":
            store.execute(f"UPDATE job SET status = {DISABLED} WHERE id = ?", (job_id,))
        if "depends_on_job_ids" in values:
            store.execute("DELETE FROM job_dependency WHERE job_id = ?", (job_id,))
            store.insert_many("INSERT INTO job_dependency (job_id, depends_on_job_id)", 2,
                              [(job_id, other) for other in set(values["depends_on_job_ids"])])
            recount(store, job["workflow_id"])
        allowed = ("name", "command", "invocation_script", "cancel_on_blocking_job_failure",
                   "supports_termination", "resource_requirements_id", "scheduler_id", "priority",
                   "stdio")
        change_job(store, job_id, {name: values[name] for name in allowed if name in values})
        if "name" in values or "depends_on_job_ids" in values:
            reshaped(store, job["workflow_id"])
    return show_job(store, job_id)


def change_job(store, job_id, values):
    """In a transaction: write plain columns of a job; scheduler 0 means none."""
    if values.get("scheduler_id") == 0:
        values["scheduler_id"] = None
    for name, value in values.items():
        store.execute(f"UPDATE job SET {name} = ? WHERE id = ?", (value, job_id))


def check_update(job, values):
    """Raise Invalid for a change that this job's state forbids."""
    for name in values:
        if name in LOCKED and job["status"] != "uninitialized":
            raise Invalid(f"{name} of job {job['id']} can be changed only while it is "
                          f"uninitialized; it is {job['status']}")
        if name in IMMUTABLE:
            raise Invalid(f"{name} of a job is immutable")
    if values.get("priority", 0) < 0:
        raise Invalid(f"priority {values['priority']} is negative")
    status = values.get("status")
    if status and not (status == "disabled" and job["status"] == "uninitialized"):
        raise Invalid(f"the status of a job is immutable here: {job['status']} does not become "
                      f"{status}")


def complete_job_request(request, job_id, status, run_id):
    """Take the result of a job and set its final status. Upstream: complete_job."""
    body = check_body(request.body, KINDS["result"].fields)
    with request.store.transaction():
        complete_job(request.store, job_id, status, run_id, body)
    return show_job(request.store, job_id)


def start_job_request(request, job_id, run_id, node_id):
    """A claimed job begins to run. Upstream: start_job."""
    with request.store.transaction():
        start_job(request.store, job_id, run_id, node_id, request.now)
    return show_job(request.store, job_id)


def manage_status_change(request, job_id, status, run_id):
    """Set a status outside the complete set."""
    with request.store.transaction():
        manage_status(request.store, job_id, status, run_id)
    return show_job(request.store, job_id)


def retry_job_request(request, job_id, run_id):
    """Ready again with the next attempt. Upstream: retry_job."""
    limit = request.need("max_retries")
    with request.store.transaction():
        retry_job(request.store, job_id, run_id, limit, request.now)
    return show_job(request.store, job_id)


def stop_job_request(request, job_id):
    """Cancel or terminate one job; its runner ends the process (ours)."""
    status = request.need("status", "status")
    with request.store.transaction():
        stop_job(request.store, job_id, status)
    return show_job(request.store, job_id)


def rerun_job_request(request, job_id):
    """Run an ended job again (ours)."""
    with request.store.transaction():
        rerun_job(request.store, job_id)
    return show_job(request.store, job_id)


def why_request(request, job_id):
    """One sentence: why a job is not running, or how it ended (ours)."""
    job = job_row(request.store, job_id)
    answer = {"job_id": job_id, "job_name": job.name, "status": STATUS_NAMES[job.status],
              "sentence": why(request.store, job_id)}
    return {**answer, "compute_node_id": job.compute_node_id} if job.compute_node_id else answer


# ---- claims and the runner's conversation

def claimed(request, job_ids):
    """Claimed jobs in upstream's form: relations only of outputs."""
    jobs = with_relations(request.store, [fetch(request.store, KINDS["job"], job_id)
                                          for job_id in job_ids])
    for job in jobs:
        for name in ("scheduler_id", "depends_on_job_ids", "input_file_ids", "input_user_data_ids"):
            job.pop(name, None)
    return jobs


def claim_next_jobs(request, workflow_id):
    """Claim ready jobs by priority, whatever they need."""
    limit = request.param("limit", "int", 10)
    with request.store.transaction():
        return {"jobs": claimed(request, claim_next(request.store, workflow_id, limit))}


CLAIM_BODY = fields("num_cpus:int! memory_gb:float! num_gpus:int! num_nodes:int! time_limit:str"
                    " scheduler_config_id:int")


def claim_jobs_based_on_resources(request, workflow_id, limit):
    """Claim the ready jobs that fit a node's free resources."""
    strict = request.param("strict_scheduler_match", "bool", False)
    body = check_body(request.body, CLAIM_BODY)
    try:
        time_left_s = parse_duration(body["time_limit"]) if "time_limit" in body else None
    except ValueError as error:
        raise Invalid(f"time_limit: {error}") from None
    if workflow_row(request.store, workflow_id, "is_canceled")[0]:
        return {"jobs": [], "reason": "Workflow is canceled"}
    want = {**body, "memory_bytes": body["memory_gb"] * 2**30, "time_left_s": time_left_s}
    with request.store.transaction():
        return {"jobs": claimed(request, claim_by_resources(request.store, workflow_id, limit,
                                                            want, strict))}


STEP_BODY = fields("compute_node_id:int! step:int starts:list completions:list returns:list"
                   " held:list claim:dict counts:bool closing:bool replay:bool")
STEP_JOB = fields("job_id:int! attempt_id:int!")
STEP_DONE = fields("job_id:int! run_id:int! attempt_id:int! status:status! return_code:int!"
                   " exec_time_minutes:float! completion_time:str! peak_memory_bytes:int"
                   " avg_memory_bytes:int peak_cpu_percent:float avg_cpu_percent:float"
                   " stderr_tail:str output_files:list requeue:bool")
STEP_CLAIM = fields("limit:int! bins:list whole:ints time_left_s:float scheduler_config_id:int"
                    " strict_scheduler_match:bool prefetch:dict")


def runner_step_request(request, workflow_id):
    """A runner reports and is given work, in one transaction (ours)."""
    step = check_body(request.body, STEP_BODY)
    for name in ("starts", "returns"):
        step[name] = [check_body(job, STEP_JOB) for job in step.get(name, ())]
    step["completions"] = [check_body(done, STEP_DONE) for done in step.get("completions", ())]
    if "claim" in step:
        claim = step["claim"] = check_body(step["claim"], STEP_CLAIM)
        if any(not has_type(one, "ints") or len(one) != 3
               for one in (*claim.get("bins", ()), claim.get("whole", [0, 0, 0]))):
            raise BadShape("fields `bins` and `whole` are not [cpus, memory_bytes, gpus]")
        if "prefetch" in step["claim"]:
            step["claim"]["prefetch"] = check_body(
                step["claim"]["prefetch"], fields("resource_requirements_id:int! limit:int!"))
    if any(not has_type(pair, "ints") or len(pair) != 2 for pair in step.get("held", ())):
        raise BadShape("field `held` is not a list of [job_id, attempt_id]")
    with request.store.transaction():
        return runner_step(request.store, workflow_id, step, request.now)


def changes(request, workflow_id):
    """What a waiting client wants to know; waits for news unless they are there already (ours)."""
    since = request.param("since", "int", 0)
    wait_s = request.param("wait_s", "int", 0)
    now = situation(request.store, workflow_id)
    if now["generation"] == since and wait_s > 0:
        request.store.wait_news(workflow_id, since, min(wait_s, 60))
        now = situation(request.store, workflow_id)
    return now


def stream_events(request, workflow_id):
    """Events as they happen, as server-sent events; level: the least severity to show."""
    level = request.param("level", default="info").lower()
    require_workflow(request.store, workflow_id)
    if not request.streams:
        raise Invalid("events are streamed over HTTP: start torc-server on this database, or ask "
                      f"GET /workflows/{workflow_id}/changes, which waits for news")
    return request.store.subscribe(workflow_id, level if level in SEVERITIES else "info")


# ---- what is derived

def get_counts(request, workflow_id):
    """Jobs by status, and the workflow's flags (ours)."""
    return counts(request.store, workflow_id)


def get_unfinished(request, workflow_id):
    """What keeps a workflow from completing (ours)."""
    require_workflow(request.store, workflow_id)
    return unfinished(request.store, workflow_id)


def get_summary(request, workflow_id):
    """How far a workflow is, how fast, and what holds it up (ours)."""
    return summary(request.store, workflow_id, request.now)


def get_graph(request, workflow_id):
    """Which job waits for which, by families above 400 jobs; around=JOB: one and its neighbours
    (ours)."""
    around = request.param("around", "int")
    require_workflow(request.store, workflow_id)
    if around is not None:
        return graph_around(request.store, workflow_id, around, request.now)
    return graph(request.store, workflow_id, request.now)


def get_failures(request, workflow_id):
    """Jobs that ended badly, in groups of one cause; group=ID: that one, with all its job ids
    (ours)."""
    wanted = request.param("group")
    require_workflow(request.store, workflow_id)
    return failures(request.store, workflow_id, wanted=wanted)


MOST_BINS = 2000


def window(request, default):
    """from, to (ms, None if absent) and bins of a request. Raises BadRequest."""
    moments = []
    for name in ("from", "to"):
        text = request.param(name)
        if text is not None and not re.fullmatch(r"-?\d{1,16}(\.\d+)?", text):
            raise BadRequest(f"query parameter {name}={text!r} is not a number of milliseconds")
        moments.append(None if text is None else int(float(text)))
    return (*moments, max(2, min(MOST_BINS, request.param("bins", "int", default))))


def get_timeline(request, workflow_id):
    """What ran where between from and to (ms), as jobs or in bins, and why runners idled (ours)."""
    begin, end, bins = window(request, 300)
    require_workflow(request.store, workflow_id)
    return timeline(request.store, workflow_id, begin, end, bins, request.now)


def get_usage(request, workflow_id):
    """CPUs and memory asked for, used and there, over time and by requirements (ours)."""
    begin, end, bins = window(request, 240)
    require_workflow(request.store, workflow_id)
    return usage(request.store, workflow_id, begin, end, bins, request.now)


def list_job_ids(request, workflow_id):
    """Ids of all jobs, ascending."""
    require_workflow(request.store, workflow_id)
    ids = [row[0] for row in request.store.bulk("SELECT id FROM job WHERE workflow_id = ?"
                                                " ORDER BY id", 1, (workflow_id,))]
    return {"job_ids": ids, "count": len(ids)}


def relationships(request, workflow_id, names, source, order):
    """A list envelope of rows of a SELECT, absent values left out."""
    page = request.page(clamp=True)
    require_workflow(request.store, workflow_id)
    total = request.store.one(f"SELECT count(*) {source}", (workflow_id,))[0]
    direction = "DESC" if page.reverse else "ASC"
    rows = request.store.bulk(
        f"SELECT {', '.join(names.values())} {source} ORDER BY "
        + ", ".join(f"{column} {direction}" for column in order) + " LIMIT ? OFFSET ?",
        len(names), (workflow_id, page.limit, max(page.offset, 0)))
    items = [{name: value for name, value in zip(names, row) if value is not None}
             for row in rows]
    return envelope(items, page, total)


def list_job_dependencies(request, workflow_id):
    """Which job depends on which; implicit ones after initialization."""
    names = {"job_id": "j.id", "job_name": "j.name", "depends_on_job_id": "p.id",
             "depends_on_job_name": "p.name", "workflow_id": "j.workflow_id"}
    order = {"depends_on_job_id": ("p.id", "j.id")}.get(request.param("sort_by"), ("j.id", "p.id"))
    return relationships(
        request, workflow_id, names, "FROM job j JOIN job_dependency d ON d.job_id = j.id"
        " JOIN job p ON p.id = d.depends_on_job_id WHERE j.workflow_id = ?", order)


def relation_names(what):
    """Columns of a relationship list of files or user data."""
    names = {f"{what}_id": "t.id", f"{what}_name": "t.name", "workflow_id": "t.workflow_id",
             "producer_job_id": "p.id", "producer_job_name": "p.name",
             "consumer_job_id": "c.id", "consumer_job_name": "c.name"}
    return {**names, "file_path": "t.path"} if what == "file" else names


def list_relations(request, what, workflow_id):
    """One row for each combination of file (or user data), producer and consumer."""
    return relationships(
        request, workflow_id, relation_names(what),
        f"FROM {what} t LEFT JOIN job_output_{what} o ON o.{what}_id = t.id"
        f" LEFT JOIN job p ON p.id = o.job_id LEFT JOIN job_input_{what} i ON i.{what}_id = t.id"
        " LEFT JOIN job c ON c.id = i.job_id WHERE t.workflow_id = ?", ("t.id", "p.id", "c.id"))


def list_file_relations(request, workflow_id):
    """Which job writes and reads which file."""
    return list_relations(request, "file", workflow_id)


def list_user_data_relations(request, workflow_id):
    """Which job writes and reads which user data."""
    return list_relations(request, "user_data", workflow_id)


def needed(store, workflow_id, what, also):
    """Ids of records that some job reads and none writes, or that a completed job has written."""
    require_workflow(store, workflow_id)
    return [row[0] for row in store.query(
        f"SELECT t.id FROM {what} t WHERE t.workflow_id = ? AND {also} AND ("
        f"(EXISTS (SELECT 1 FROM job_input_{what} i WHERE i.{what}_id = t.id) AND NOT EXISTS"
        f" (SELECT 1 FROM job_output_{what} o WHERE o.{what}_id = t.id)) OR EXISTS (SELECT 1 FROM"
        f" job_output_{what} o JOIN job j ON j.id = o.job_id WHERE o.{what}_id = t.id"
        f" AND j.status = {COMPLETED})) ORDER BY t.id", (workflow_id,))]


def required_existing_files(request, workflow_id):
    """Files that must exist now."""
    return {"files": needed(request.store, workflow_id, "file", "1")}


def missing_user_data(request, workflow_id):
    """User data without a value that should have one."""
    return {"user_data": needed(request.store, workflow_id, "user_data", "t.data IS NULL")}


def ready_job_requirements(request, workflow_id):
    """Totals over the ready jobs."""
    require_workflow(request.store, workflow_id)
    row = request.store.one(
        "SELECT count(*), coalesce(sum(r.num_cpus), 0), coalesce(sum(r.num_gpus), 0),"
        " coalesce(sum(r.memory_bytes), 0), coalesce(max(r.num_nodes), 0),"
        " coalesce(max(r.runtime_s), 0) FROM job j JOIN resource_requirements r ON r.id ="
        f" j.resource_requirements_id WHERE j.workflow_id = ? AND j.status = {READY}",
        (workflow_id,))
    return {"num_jobs": row[0], "num_cpus": row[1], "num_gpus": row[2],
            "memory_gb": row[3] / 2**30, "max_num_nodes": row[4], "max_runtime": f"PT{row[5]}S"}


# ---- resource requirements

def checked_requirements(values):
    """Requirements with defaults filled in and the two texts parsed. Raises Invalid."""
    full = {"num_cpus": 1, "num_gpus": 0, "num_nodes": 1, "memory": "1m", "runtime": "PT1M",
            **values}
    try:
        parsed = {"memory_bytes": parse_memory(full["memory"]),
                  "runtime_s": parse_duration(full["runtime"])}
    except ValueError as error:
        raise Invalid(f"resource requirements {full['name']!r}: {error}") from None
    if full["num_nodes"] <= 0:
        raise Invalid(f"resource requirements {full['name']!r}: num_nodes {full['num_nodes']} is "
                      "not positive")
    return {**full, **parsed}


REQUIREMENT_COLUMNS = ("name", "num_cpus", "num_gpus", "num_nodes", "memory", "runtime",
                       "memory_bytes", "runtime_s")


def insert_requirements(store, workflow_id, records):
    """In a transaction: insert resource requirements."""
    rows = [(workflow_id, *(checked[name] for name in REQUIREMENT_COLUMNS))
            for checked in map(checked_requirements, records)]
    store.insert_many(f"INSERT INTO resource_requirements (workflow_id,"
                      f" {', '.join(REQUIREMENT_COLUMNS)})", len(REQUIREMENT_COLUMNS) + 1, rows)


def create_resource_requirements(request):
    """Store resource requirements; the name "default" is taken."""
    values = check_body(request.body, KINDS["resource_requirements"].fields)
    require_workflow(request.store, values["workflow_id"])
    if values["name"] == "default":
        raise Internal('the name "default" is reserved for the requirements every workflow has')
    with request.store.transaction():
        record_id = next_id(request.store, "resource_requirements")
        insert_requirements(request.store, values["workflow_id"], [values])
    full = checked_requirements(values)
    return {"workflow_id": values["workflow_id"], "id": record_id,
            **{name: full[name] for name in REQUIREMENT_COLUMNS[:6]}}


def update_resource_requirements(request, record_id):
    """Change resource requirements and keep an event about it."""
    kind = KINDS["resource_requirements"]
    values = check_body(request.body, kind.fields, partial=True)
    store = request.store
    with store.transaction():
        old = fetch(store, kind, record_id)
        full = checked_requirements({**old, **values})
        store.execute(f"UPDATE resource_requirements SET {' = ?, '.join(REQUIREMENT_COLUMNS)} = ?"
                      " WHERE id = ?", [full[name] for name in REQUIREMENT_COLUMNS] + [record_id])
        new = fetch(store, kind, record_id)
        if new != old:
            event = {name: new[name] for name in REQUIREMENT_COLUMNS[:6]}
            store_event(store, old["workflow_id"], request.now, {
                "category": "user_action", "action": "update_resource_requirements",
                "user": request.subject, "resource_requirements_id": record_id,
                **event})
            store.news(old["workflow_id"])
    return new


# ---- files, user data, results, events, nodes, failure handlers

def update_file(request, file_id):
    """Change a file; st_mtime is always written, absent means none, as upstream."""
    values = check_body(request.body, KINDS["file"].fields, partial=True)
    with request.store.transaction():
        fetch(request.store, KINDS["file"], file_id)
        change(request.store, KINDS["file"], file_id, {"st_mtime": None, **values})
    return fetch(request.store, KINDS["file"], file_id)


def create_user_data(request):
    """Store user data, with the jobs that read or write it if the query names them."""
    relations = [(request.param(name, "int"), table) for name, table in
                 (("consumer_job_id", "job_input_user_data"),
                  ("producer_job_id", "job_output_user_data"))]
    kind = KINDS["user_data"]
    values = check_body(request.body, kind.fields)
    require_workflow(request.store, values["workflow_id"])
    with request.store.transaction():
        record_id = add(request.store, kind, values)
        for job_id, table in relations:
            if job_id is not None:
                request.store.execute(f"INSERT INTO {table} (job_id, user_data_id) VALUES (?, ?)",
                                      (job_id, record_id))
    return {**values, "id": record_id}


def create_result(request):
    """Store a result as the job's latest; no status changes."""
    values = check_body(request.body, KINDS["result"].fields)
    require_workflow(request.store, values["workflow_id"])
    values["attempt_id"] = values.get("attempt_id") or 1
    with request.store.transaction():
        result_id = store_result(request.store,
                                 {**values, "status": STATUS_OF_NAME[values["status"]]})
    return {**values, "id": result_id}


def list_results(request):
    """Each job's latest result, or all; include_stderr adds the last lines of failed ones."""
    tail = request.param("include_stderr", "bool", False)
    return list_records(request, KINDS["result"], without=() if tail else ("stderr_tail",))


def create_event(request):
    """Store an event; the server's clock sets its time."""
    body = check_body(request.body, fields("workflow_id:int!"))
    require_workflow(request.store, body["workflow_id"])
    if "data" not in request.body:
        raise BadShape("missing field `data`")
    with request.store.transaction():
        event_id = store_event(request.store, body["workflow_id"], request.now,
                               request.body["data"])
    return fetch(request.store, KINDS["event"], event_id)


def update_event(request, event_id):
    """Replace an event's data by the body."""
    with request.store.transaction():
        fetch(request.store, KINDS["event"], event_id)
        request.store.execute("UPDATE event SET data = ? WHERE id = ?",
                              (compact(request.body), event_id))
    return fetch(request.store, KINDS["event"], event_id)


def list_failure_handlers(request, workflow_id):
    """Failure handlers of a workflow."""
    return list_records(request, KINDS["failure_handler"], workflow_id)


def create_compute_node(request):
    """Store a compute node; the answer echoes the request with the new id."""
    kind = KINDS["compute_node"]
    values = check_body(request.body, kind.fields)
    require_workflow(request.store, values["workflow_id"])
    with request.store.transaction():
        node_id = add(request.store, kind, values)
        tell_node(request.store, node_id, started=True)
    return {**values, "id": node_id}


def update_compute_node(request, node_id):
    """Change the fields given; a runner that ends sets is_active to false."""
    kind = KINDS["compute_node"]
    values = check_body(request.body, kind.fields, partial=True)
    with request.store.transaction():
        before = fetch(request.store, kind, node_id)
        change(request.store, kind, node_id, values)
        if before["is_active"] and values.get("is_active") is False:
            tell_node(request.store, node_id, started=False)
    return fetch(request.store, kind, node_id)


def release_compute_node(request, node_id):
    """A node's runner is proven dead: its jobs are ready again (ours).

    status and return_code: what the running ones become instead. reason: why, for people.
    """
    status, code = request.param("status", "status"), request.param("return_code", "int", 1)
    if status is not None and status not in UNSUCCESSFUL:
        raise Invalid(f"status {STATUS_NAMES[status]} is not one of a job that was ended")
    ended = None if status is None else (status, code)
    with request.store.transaction():
        requeued, others = release_node(request.store, node_id, request.now, ended,
                                        request.param("reason", default=""))
    return {"requeued": requeued, "canceled": others}


def create_scheduled_node(request):
    """Store a scheduled compute node; once=true (ours): the one there is for this Slurm job."""
    kind, store = KINDS["scheduled_compute_node"], request.store
    values = check_body(request.body, kind.fields)
    once = request.param("once", "bool", False)
    require_workflow(store, values["workflow_id"])
    with store.transaction():
        row = once and store.one(
            "SELECT id FROM scheduled_compute_node WHERE workflow_id = ? AND scheduler_id = ? AND"
            " scheduler_type = ?", tuple(values[name] for name in (
                "workflow_id", "scheduler_id", "scheduler_type")))
        if row:
            return fetch(store, kind, row[0])
        store.news(values["workflow_id"])
        made = {**values, "id": add(store, kind, values)}
        if store.is_heard(values["workflow_id"]):
            store.tell(values["workflow_id"], "scheduler_node_created", "info", {
                "category": "scheduler", "scheduled_compute_node_id": made["id"],
                **{name: values[name] for name in ("scheduler_id", "scheduler_config_id",
                                                   "scheduler_type", "status")}})
        return made


def list_slurm_stats(request):
    """What Slurm's accounting says of attempts; a limit that is too large is cut."""
    answer = list_records(request, KINDS["slurm_stats"], clamp=True)
    return {**answer, "max_limit": request.page(clamp=True).limit}


# ---- actions

SCHEDULE_FIELDS = {"scheduler_id": "int", "scheduler_type": "str", "num_allocations": "int",
                   "start_one_worker_per_node": "bool", "max_parallel_jobs": "int"}
ACTION_BODY = fields("trigger_type:str! action_type:str! action_config:any! job_ids:ints"
                     " trigger_count:int required_triggers:int executed:bool persistent:bool"
                     " is_recovery:bool workflow_id:int")


def check_action(action):
    """Raise Invalid for an action_config that does not suit its action_type."""
    config, kind = action["action_config"], action["action_type"]
    if not isinstance(config, dict):
        raise Invalid("action_config is not an object")
    if kind == "run_commands":
        commands = config.get("commands")
        if list(config) != ["commands"] or not isinstance(commands, list) or not all(
                isinstance(command, str) and command.strip() for command in commands):
            raise Invalid('action_config of run_commands is {"commands": [...]} with command lines')
    elif kind == "schedule_nodes":
        for name, value in config.items():
            if name not in SCHEDULE_FIELDS or not has_type(value, SCHEDULE_FIELDS[name]):
                raise Invalid(f"action_config of schedule_nodes: {name} = {value!r} is not known "
                              f"or not {TYPE_NAMES.get(SCHEDULE_FIELDS.get(name), 'a field')}")


def create_action(request, workflow_id):
    """Store an action of a workflow; nothing is triggered by that."""
    action = check_body(request.body, ACTION_BODY)
    require_workflow(request.store, workflow_id)
    check_action(action)
    with request.store.transaction():
        action_id = add_action(request.store, workflow_id, action)
        request.store.news(workflow_id)
    return {**action, "workflow_id": workflow_id, "id": action_id}


def get_actions(request, workflow_id):
    """All actions of a workflow."""
    require_workflow(request.store, workflow_id)
    return actions(request.store, workflow_id)


def get_pending_actions(request, workflow_id):
    """Actions that are triggered and not executed; trigger_type may be repeated."""
    require_workflow(request.store, workflow_id)
    return actions(request.store, workflow_id, pending=True,
                   triggers=request.query.get("trigger_type", ()))


def claim_action_request(request, workflow_id, action_id):
    """Take an action; the loser of a race gets Conflict."""
    body = check_body(request.body, fields("compute_node_id:int"))
    with request.store.transaction():
        claim_action(request.store, workflow_id, action_id, body.get("compute_node_id"),
                     request.now)
    return {"success": True, "action_id": action_id}


def unclaim_action_request(request, workflow_id, action_id):
    """An action that was claimed could not be carried out: it is pending again (ours)."""
    require_workflow(request.store, workflow_id)
    with request.store.transaction():
        unclaim_action(request.store, workflow_id, action_id)
    return {"success": True, "action_id": action_id}


# ---- access: groups, members, what is shared

GROUP = fields("id:int* name:str! description:str created_at:str*")
MEMBER = fields("id:int* user_name:str! group_id:int role:str! created_at:str*")


def require_admin(request, group_id=ADMIN_GROUP):
    """Raise Forbidden unless the caller is a system admin, or an admin of the group."""
    if request.access.enforced and not is_admin(request.store, request.user, group_id):
        whom = "an admin" if group_id == ADMIN_GROUP else f"an admin of group {group_id}"
        raise Forbidden(f"{request.subject} is not {whom}")


def require_self(request, user):
    """Raise Forbidden unless the caller is that user or a system admin."""
    if request.user != user:
        require_admin(request)


def group_row(store, group_id):
    """A group as clients see it. Raises NotFound."""
    row = store.one("SELECT id, name, description, created_at FROM access_group WHERE id = ?",
                    (group_id,))
    if not row:
        raise NotFound(f"Access group not found with ID: {group_id}")
    return to_record(GROUP, row)


def short_listing(request, wanted, source, params):
    """A list of groups or members; upstream gives it an envelope of its own."""
    page = request.page()
    total = request.store.one(f"SELECT count(*) FROM {source}", params)[0]
    names = ", ".join(f"t.{field.name}" for field in wanted)
    rows = request.store.query(f"SELECT {names} FROM {source} ORDER BY t.id LIMIT ? OFFSET ?",
                               [*params, page.limit, max(page.offset, 0)])
    return {"items": [to_record(wanted, row) for row in rows], "offset": page.offset,
            "limit": page.limit, "total_count": total,
            "has_more": max(page.offset, 0) + len(rows) < total}


def create_access_group(request):
    """A group of users, with whom workflows can be shared."""
    values = check_body(request.body, GROUP)
    require_admin(request)
    with request.store.transaction():
        group_id = request.store.insert(
            "INSERT INTO access_group (name, description) VALUES (?, ?)",
            (values["name"], values.get("description")))
    return group_row(request.store, group_id)


def list_access_groups(request):
    """All groups."""
    require_admin(request)
    return short_listing(request, GROUP, "access_group t", ())


def get_access_group(request, group_id):
    """One group."""
    group = group_row(request.store, group_id)
    require_admin(request)
    return group


def delete_access_group(request, group_id):
    """Delete a group with its memberships; what it shared is shared no more."""
    group = group_row(request.store, group_id)
    require_admin(request)
    if group_id == ADMIN_GROUP:
        raise Forbidden(f"the system group {group['name']} cannot be deleted")
    with request.store.transaction():
        request.store.execute("DELETE FROM access_group WHERE id = ?", (group_id,))
    return group


def members_of(request, group_id):
    """Check that the caller may change the members of a group. Raises NotFound, Forbidden."""
    group = group_row(request.store, group_id)
    if group_id == ADMIN_GROUP:
        raise Forbidden(f"the members of the system group {group['name']} are those named by the "
                        "server's --admin-user")
    require_admin(request, group_id)


def add_member(request, group_id):
    """Put a user into a group. Upstream: add_user_to_group."""
    values = check_body(request.body, MEMBER)
    members_of(request, group_id)
    with request.store.transaction():
        member_id = request.store.insert(
            "INSERT INTO user_group_membership (user_name, group_id, role) VALUES (?, ?, ?)",
            (values["user_name"], group_id, values["role"]))
    return member_row(request.store, "id = ?", (member_id,))


def member_row(store, where, params):
    """A membership as clients see it, None if there is none."""
    row = store.one("SELECT id, user_name, group_id, role, created_at FROM user_group_membership"
                    f" WHERE {where}", params)
    return to_record(MEMBER, row) if row else None


def list_members(request, group_id):
    """The members of a group."""
    group_row(request.store, group_id)
    require_admin(request, group_id)
    return short_listing(request, MEMBER, "user_group_membership t WHERE t.group_id = ?",
                         (group_id,))


def remove_member(request, group_id, user):
    """Take a user out of a group. Upstream: remove_user_from_group."""
    members_of(request, group_id)
    with request.store.transaction():
        member = member_row(request.store, "group_id = ? AND user_name = ?", (group_id, user))
        if not member:
            raise NotFound(f"user {user} is not in group {group_id}")
        request.store.execute("DELETE FROM user_group_membership WHERE id = ?", (member["id"],))
    return member


def list_user_groups(request, user):
    """The groups a user is in."""
    require_self(request, user)
    return short_listing(request, GROUP, "access_group t JOIN user_group_membership m"
                         " ON m.group_id = t.id WHERE m.user_name = ?", (user,))


def list_workflow_groups(request, workflow_id):
    """The groups a workflow is shared with."""
    require_workflow(request.store, workflow_id)
    return short_listing(request, GROUP, "access_group t JOIN workflow_access_group w"
                         " ON w.group_id = t.id WHERE w.workflow_id = ?", (workflow_id,))


def may_share(request, workflow_id, group_id):
    """Check that the caller may link workflow and group. Raises NotFound, Forbidden."""
    owner = workflow_row(request.store, workflow_id, "user")[0]
    group_row(request.store, group_id)
    if request.user != owner:
        require_admin(request, group_id)


def share_workflow(request, workflow_id, group_id):
    """Let a group use a workflow. Upstream: add_workflow_to_group."""
    may_share(request, workflow_id, group_id)
    with request.store.transaction():
        request.store.insert("INSERT INTO workflow_access_group (workflow_id, group_id)"
                             " VALUES (?, ?)", (workflow_id, group_id))
    return shared(request.store, workflow_id, group_id)


def shared(store, workflow_id, group_id):
    """A link of workflow and group as clients see it. Raises NotFound."""
    row = store.one("SELECT created_at FROM workflow_access_group WHERE workflow_id = ?"
                    " AND group_id = ?", (workflow_id, group_id))
    if not row:
        raise NotFound(f"workflow {workflow_id} is not shared with group {group_id}")
    return {"workflow_id": workflow_id, "group_id": group_id, "created_at": row[0]}


def unshare_workflow(request, workflow_id, group_id):
    """A group may use a workflow no more. Upstream: remove_workflow_from_group."""
    may_share(request, workflow_id, group_id)
    with request.store.transaction():
        link = shared(request.store, workflow_id, group_id)
        request.store.execute("DELETE FROM workflow_access_group WHERE workflow_id = ?"
                              " AND group_id = ?", (workflow_id, group_id))
    return link


def access_check(request, workflow_id, user):
    """Whether a user owns a workflow or shares it. Upstream: check_workflow_access."""
    require_self(request, user)
    allowed = has_access(request.store, workflow_id, user)
    answer = {"has_access": allowed, "user_name": user, "workflow_id": workflow_id}
    return answer if allowed else {**answer, "reason": "neither owner nor in a group that the "
                                                       "workflow is shared with"}


def reload_auth(request):
    """Read the password file again. Upstream: reload_auth."""
    require_admin(request)
    gate = request.access.gate
    if not gate:
        error = Internal("the server was started without --auth-file")
        error.title = "NoAuthFile"
        raise error
    try:
        number = gate.reload()
    except Unreachable as trouble:
        error = Internal(f"{trouble}; the users stay as they were")
        error.title = "ReloadFailed"
        raise error from None
    return {"message": "Auth credentials reloaded successfully", "user_count": number}


# ---- who may call what: see who_may

def anyone(request, values):
    """Whoever reaches the server, or whom the operation itself lets."""


def somebody(request, values):
    """Any user, but with a name."""
    if not request.user:
        raise Forbidden(f"{request.subject} may not create workflows here: give a user name and "
                        "password (TORC_USERNAME, TORC_PASSWORD)")


def user_of_workflow(request, values):
    """Who may use the workflow whose id stands in the path."""
    require_access(request.store, values[0], request.user)


def user_of_named(request, values):
    """Who may use every workflow that the query or the body names."""
    body = request.body if isinstance(request.body, dict) else {}
    jobs = body["jobs"] if isinstance(body.get("jobs"), list) else []
    named = [body, *(job for job in jobs if isinstance(job, dict))]
    for workflow_id in {request.param("workflow_id", "int"),
                        *(record["workflow_id"] for record in named
                          if has_type(record.get("workflow_id"), "int"))} - {None}:
        require_access(request.store, workflow_id, request.user)


def user_of(table):
    """Who may use the workflow of the record whose id stands in the path."""
    def check(request, values):
        row = request.store.one(f"SELECT workflow_id FROM {table} WHERE id = ?", (values[0],))
        if row:
            require_access(request.store, row[0], request.user)
    return check


# ---- the whole surface

NONE, JSON = "no body", "JSON body"
VERBS = {                                 # word of Kind.ops: method, path behind the kind's, body
    "create": ("POST", "", create_record, JSON), "list": ("GET", "", list_records, NONE),
    "clear": ("DELETE", "", clear_records, NONE), "get": ("GET", "/<id:int>", get_record, NONE),
    "update": ("PUT", "/<id:int>", update_record, JSON),
    "delete": ("DELETE", "/<id:int>", delete_record, NONE),
}


def crud_routes(kinds):
    """Routes of the generic operations that each kind takes part in."""
    for kind in kinds.values():
        for word in kind.ops.split():
            method, path, function, body = VERBS[word]
            yield method, kind.path + path, bind_kind(function, kind), body


def bind_kind(function, kind):
    """A generic operation for one kind."""
    def operation(request, *values):
        return function(request, kind, *values)
    operation.__doc__ = function.__doc__
    return operation


WF = "/workflows/<id:int>"
ROUTES = (
    # method  path                                             function                      body
    ("GET",    "/ping",                                        ping,                         NONE),
    ("GET",    "/version",                                     version,                      NONE),
    ("GET",    "/server_info",                                 server_info,                  NONE),
    ("POST",   "/workflow_specs",                              create_from_spec,             JSON),
    ("POST",   "/workflows",                                   create_workflow,              JSON),
    ("GET",    "/workflows",                                   list_workflows,               NONE),
    ("GET",    WF,                                             get_workflow,                 NONE),
    ("PUT",    WF,                                             update_workflow,              JSON),
    ("DELETE", WF,                                             delete_workflow,              NONE),
    ("GET",    WF + "/status",                                 get_workflow_status,          NONE),
    ("PUT",    WF + "/status",                                 update_workflow_status,       JSON),
    ("GET",    WF + "/counts",                                 get_counts,                   NONE),
    ("GET",    WF + "/changes",                                changes,                      NONE),
    ("GET",    WF + "/events/stream",                          stream_events,                NONE),
    ("GET",    WF + "/unfinished",                             get_unfinished,               NONE),
    ("GET",    WF + "/summary",                                get_summary,                  NONE),
    ("GET",    WF + "/graph",                                  get_graph,                    NONE),
    ("GET",    WF + "/failures",                               get_failures,                 NONE),
    ("GET",    WF + "/timeline",                               get_timeline,                 NONE),
    ("GET",    WF + "/usage",                                  get_usage,                    NONE),
    ("POST",   WF + "/runner_step",                            runner_step_request,          JSON),
    ("PUT",    WF + "/cancel",                                 cancel,                       NONE),
    ("POST",   WF + "/reset_status",                           reset_status,                 NONE),
    ("POST",   WF + "/reset_job_status",                       reset_job_status,             NONE),
    ("POST",   WF + "/initialize_jobs",                        initialize,                   NONE),
    ("POST",   WF + "/process_changed_job_inputs",             process_changed_job_inputs,   NONE),
    ("GET",    WF + "/is_complete",                            is_workflow_complete,         NONE),
    ("GET",    WF + "/is_uninitialized",                       is_workflow_uninitialized,    NONE),
    ("POST",   WF + "/claim_next_jobs",                        claim_next_jobs,              NONE),
    ("POST",   WF + "/claim_jobs_based_on_resources/<limit:int>", claim_jobs_based_on_resources,
     JSON),
    ("GET",    WF + "/job_ids",                                list_job_ids,                 NONE),
    ("GET",    WF + "/job_dependencies",                       list_job_dependencies,        NONE),
    ("GET",    WF + "/job_file_relationships",                 list_file_relations,          NONE),
    ("GET",    WF + "/job_user_data_relationships",            list_user_data_relations,     NONE),
    ("GET",    WF + "/required_existing_files",                required_existing_files,      NONE),
    ("GET",    WF + "/missing_user_data",                      missing_user_data,            NONE),
    ("GET",    WF + "/ready_job_requirements",                 ready_job_requirements,       NONE),
    ("GET",    WF + "/failure_handlers",                       list_failure_handlers,        NONE),
    ("POST",   WF + "/actions",                                create_action,                JSON),
    ("GET",    WF + "/actions",                                get_actions,                  NONE),
    ("GET",    WF + "/actions/pending",                        get_pending_actions,          NONE),
    ("POST",   WF + "/actions/<action:int>/claim",             claim_action_request,         JSON),
    ("DELETE", WF + "/actions/<action:int>/claim",             unclaim_action_request,       NONE),
    ("POST",   "/jobs",                                        create_job,                   JSON),
    ("POST",   "/bulk_jobs",                                   create_bulk_jobs,             JSON),
    ("GET",    "/jobs",                                        list_jobs,                    NONE),
    ("GET",    "/jobs/<id:int>",                               get_job,                      NONE),
    ("PUT",    "/jobs/<id:int>",                               update_job,                   JSON),
    ("POST",   "/jobs/<id:int>/complete_job/<status:status>/<run:int>", complete_job_request,
     JSON),
    ("PUT",    "/jobs/<id:int>/start_job/<run:int>/<node:int>", start_job_request,           NONE),
    ("PUT",    "/jobs/<id:int>/manage_status_change/<status:status>/<run:int>",
     manage_status_change, NONE),
    ("POST",   "/jobs/<id:int>/retry/<run:int>",               retry_job_request,            NONE),
    ("POST",   "/jobs/<id:int>/stop",                          stop_job_request,             NONE),
    ("POST",   "/jobs/<id:int>/rerun",                         rerun_job_request,            NONE),
    ("GET",    "/jobs/<id:int>/why",                           why_request,                  NONE),
    ("POST",   "/resource_requirements",                       create_resource_requirements, JSON),
    ("GET",    "/resource_requirements",
     bind_kind(list_records, KINDS["resource_requirements"]), NONE),
    ("PUT",    "/resource_requirements/<id:int>",              update_resource_requirements, JSON),
    ("GET",    "/files",                            bind_kind(list_records, KINDS["file"]),  NONE),
    ("PUT",    "/files/<id:int>",                              update_file,                  JSON),
    ("POST",   "/user_data",                                   create_user_data,             JSON),
    ("GET",    "/user_data",                   bind_kind(list_records, KINDS["user_data"]),  NONE),
    ("POST",   "/results",                                     create_result,                JSON),
    ("GET",    "/results",                                     list_results,                 NONE),
    ("POST",   "/events",                                      create_event,                 JSON),
    ("GET",    "/events",                           bind_kind(list_records, KINDS["event"]), NONE),
    ("PUT",    "/events/<id:int>",                             update_event,                 JSON),
    ("POST",   "/compute_nodes",                               create_compute_node,          JSON),
    ("PUT",    "/compute_nodes/<id:int>",                      update_compute_node,          JSON),
    ("POST",   "/compute_nodes/<id:int>/release",              release_compute_node,         NONE),
    ("POST",   "/scheduled_compute_nodes",                     create_scheduled_node,        JSON),
    ("GET",    "/slurm_stats",                                 list_slurm_stats,             NONE),
    ("POST",   "/admin/reload-auth",                           reload_auth,                  NONE),
    ("POST",   "/access_groups",                               create_access_group,          JSON),
    ("GET",    "/access_groups",                               list_access_groups,           NONE),
    ("GET",    "/access_groups/<id:int>",                      get_access_group,             NONE),
    ("DELETE", "/access_groups/<id:int>",                      delete_access_group,          NONE),
    ("POST",   "/access_groups/<id:int>/members",              add_member,                   JSON),
    ("GET",    "/access_groups/<id:int>/members",              list_members,                 NONE),
    ("DELETE", "/access_groups/<id:int>/members/<user:str>",   remove_member,                NONE),
    ("GET",    "/users/<user:str>/groups",                     list_user_groups,             NONE),
    ("GET",    "/access_check/<id:int>/<user:str>",            access_check,                 NONE),
    ("GET",    WF + "/access_groups",                          list_workflow_groups,         NONE),
    ("POST",   WF + "/access_groups/<group:int>",              share_workflow,               NONE),
    ("DELETE", WF + "/access_groups/<group:int>",              unshare_workflow,             NONE),
    *crud_routes({table: kind for table, kind in KINDS.items() if table != "workflow"}),
)


def path_value(kind, text):
    """A value in a path as int or status number. Raises BadRequest."""
    if kind == "int" and re.fullmatch(r"[-+]?\d{1,18}", text):
        return int(text)
    if kind == "status" and text in STATUS_OF_NAME:
        return STATUS_OF_NAME[text]
    if kind == "str":
        return text
    raise BadRequest(f"{text!r} in the path is not {TYPE_NAMES[kind]}")


class Endpoint(NamedTuple):
    """What a route leads to."""

    method: str
    path: str
    function: Any
    body: str
    types: tuple                          # of the values in its path
    who: Any                              # raises Forbidden for those who may not, see who_may


ANYONE = ("/ping", "/version", "/server_info", "/workflows")
SELF_GUARDED = ("/access_groups", "/users", "/access_check", "/admin")      # they check themselves


def who_may(method, path):
    """The check that access control makes before an operation, by its path."""
    kinds = {kind.path: kind for kind in KINDS.values()}
    words = path.split("/")
    first = "/" + words[1]
    if path in ("/workflows", "/workflow_specs") and method == "POST":
        return somebody
    if path in ANYONE or first in SELF_GUARDED:
        return anyone
    if path.startswith(WF):
        return user_of_workflow
    if path in kinds or path == "/bulk_jobs":
        return user_of_named
    return user_of(kinds[first].table)    # KeyError for a path without a rule


def build_index(routes):
    """Routes by (number of segments, fixed segments joined): {method: Endpoint}."""
    index = {}
    for method, path, function, body in routes:
        segments = path.strip("/").split("/")
        pattern = tuple("*" if segment.startswith("<") else segment for segment in segments)
        types = tuple(segment[1:-1].split(":")[1] for segment in segments if segment[0] == "<")
        index.setdefault(pattern, {})[method] = Endpoint(method, path, function, body, types,
                                                         who_may(method, path))
    return index


INDEX = build_index(ROUTES)
PATTERNS = {}                             # by number of segments and the first one
for _pattern in INDEX:
    PATTERNS.setdefault((len(_pattern), _pattern[0]), []).append(_pattern)


def find_endpoint(method, path):
    """(Endpoint, texts of its path values) for a path without prefix.

    Raises NotFound, or BadRequest with .allow (methods that exist) for another method.
    """
    segments = path.split("/")[1:]
    for pattern in PATTERNS.get((len(segments), segments[0]) if segments else (), ()):
        if all(want == "*" and have or want == have for want, have in zip(pattern, segments)):
            methods = INDEX[pattern]
            if method not in methods:
                error = WrongMethod(f"{path} does not take {method}")
                error.allow = sorted(methods)
                raise error
            return methods[method], [have for want, have in zip(pattern, segments) if want == "*"]
    raise NoSuchPath(f"there is no {path} here")


class WrongMethod(TorcError):
    """A known path was called with a method it does not have; .allow lists those it has."""

    status, title, plain = 405, "MethodNotAllowed", True


class NoSuchPath(NotFound):
    """The URL leads nowhere; the answer has an empty body."""


def call_endpoint(endpoint, texts, request):
    """Run an operation with the values of its path, converted."""
    values = [path_value(kind, text) for kind, text in zip(endpoint.types, texts)]
    if request.access.enforced:
        endpoint.who(request, values)
    return endpoint.function(request, *values)


# ==================================================================================================
# 9 Client
# ==================================================================================================
# Client speaks HTTP with the standard library; LocalClient calls the operations of section 8 on a
# database file. Same methods, same errors. A client is used by one thread at a time.

IDLE_S = 100.0                            # servers close idle connections after 120 s and more
PAGE_SIZE = 10_000
PROXY_HINT = "is a Torc server there? the answer is not one of its"


def user_name():
    """The user in whose name we act: TORC_USERNAME, USER, USERNAME, or the login name."""
    for name in ("TORC_USERNAME", "USER", "USERNAME"):
        if os.environ.get(name):
            return os.environ[name]
    import pwd
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return "unknown"


def torc_home():
    """The directory in the user's home where servers leave a note of where they are."""
    return os.path.join(os.path.expanduser("~"), ".torc")


def server_note(server_id):
    """Path of the note that the server with this id keeps up to date (0600)."""
    return os.path.join(torc_home(), "servers", f"{server_id}.json")


def noted_urls(server_id):
    """Where the server with this id says it is, by the note it keeps in the user's home."""
    try:
        with open(server_note(server_id or ""), encoding="utf-8") as file:
            return list(json.load(file)["urls"])
    except (OSError, ValueError, KeyError):
        return []


def is_loopback(host):
    """Whether a host name or address means this machine only."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def resolved(host):
    """The addresses that a host name leads to here; none if it is unknown."""
    import socket
    try:
        return [row[4][0] for row in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []


def make_url(scheme, host, port, prefix=API_PREFIX):
    """The base URL of a server."""
    return f"{scheme}://{'[' + host + ']' if ':' in host else host}:{port}{prefix}"


def query_lists(query):
    """Query parameters as lists of texts: None is absent, True is "true", a list repeats."""
    lists = {}
    for name, value in query.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        texts = [str(item).lower() if isinstance(item, bool) else str(item)
                 for item in values if item is not None]
        if texts:
            lists[name] = texts
    return lists


class Calls:
    """What Client and LocalClient share: shorthands around request()."""

    user = ""
    where = ""
    is_local = False

    def request(self, method, path, query=None, body=None):
        """Call an operation; returns its decoded JSON. Raises the errors of section 2."""
        raise NotImplementedError

    def get(self, path, **query):
        """GET path."""
        return self.request("GET", path, query)

    def post(self, path, body=None, **query):
        """POST path, with a JSON body unless it is None."""
        return self.request("POST", path, query, body)

    def put(self, path, body=None, **query):
        """PUT path, with a JSON body unless it is None."""
        return self.request("PUT", path, query, body)

    def delete(self, path, **query):
        """DELETE path."""
        return self.request("DELETE", path, query)

    def page(self, path, **query):
        """One page of a list, with its envelope."""
        return self.get(path, **query)

    def items(self, path, **query):
        """All records of a list, page by page; limit and offset in the query are honoured."""
        left = query.pop("limit", None)
        offset = query.pop("offset", None) or 0
        while left is None or left > 0:
            size = PAGE_SIZE if left is None else min(left, PAGE_SIZE)
            page = self.get(path, **query, limit=size, offset=offset)
            yield from page["items"]
            if not page["has_more"] or not page["items"]:
                return
            offset += len(page["items"])
            left = None if left is None else left - len(page["items"])

    def server_id(self):
        """Id of the database behind this client; it survives restarts."""
        return self.get("/server_info")["id"]


class LocalClient(Calls):
    """The operations on a database file, without a server."""

    is_local = True

    def __init__(self, path, user=None, store=None):
        self.path = os.path.abspath(path)
        self.where = path
        self.user = user or user_name()
        self._owner = store is None
        self.store = store or Store(path, shared=True)

    def request(self, method, path, query=None, body=None):
        """See Calls.request."""
        endpoint, texts = find_endpoint(method, path)
        return call_endpoint(endpoint, texts, Request(
            self.store, self.user, query_lists(query or {}), body, time.time()))

    def job_environment(self):
        """What a job needs to reach its workflow."""
        return {"TORC_DATABASE": self.path}

    def clone(self):
        """Another client of the same database, for another thread."""
        return LocalClient(self.where, self.user, self.store)

    def interrupt(self):
        """End the wait of another thread in this client, and all later ones."""
        self.store.wake()

    def close(self):
        """Close the database, if this client opened it."""
        if self._owner:
            self.store.close()


# ---- what can go wrong on the way

MEANINGS = {                              # state of a Probe: what it is, what it means
    "refused": "connection refused: no program listens there. The server is gone, or it listens on "
               "another address (one on 127.0.0.1 is reached from its own machine only)",
    "unknown name": "this machine does not know the name: give the server a --host that it knows",
    "no route": "there is no way to that address from here: give the server a --host on a network "
                "that both have",
    "no answer": "no answer in time: a firewall drops what is sent to that port, or the machine is "
                 "down. Take a port or a --host that lets it pass",
    "not Torc": "another program answers there: give the server another --port",
    "other server": "another Torc server answers there",
    "not HTTP": "what answers is not HTTP, or not TLS: is the URL's http:// or https:// right?",
    "certificate": "its certificate is not accepted",
    "broken": "the connection broke",
}


def state_of(error):
    """The state of MEANINGS that an error of a connection stands for."""
    import http.client
    import socket
    import ssl
    if isinstance(error, ssl.SSLError):
        return "certificate" if isinstance(error, ssl.SSLCertVerificationError) else "not HTTP"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "unknown name"
    if isinstance(error, (socket.timeout, TimeoutError)) or (
            getattr(error, "errno", None) == errno.ETIMEDOUT):
        return "no answer"
    if getattr(error, "errno", None) in (errno.EHOSTUNREACH, errno.ENETUNREACH,
                                         errno.EADDRNOTAVAIL):
        return "no route"
    if isinstance(error, http.client.BadStatusLine) and not isinstance(
            error, http.client.RemoteDisconnected):
        return "not HTTP"
    return "broken"


def split_url(url):
    """(scheme, host, port, path prefix) of a server's URL. Raises UsageError."""
    from urllib.parse import urlsplit
    url = url if "//" in url else f"http://{url}"
    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        host = parts.hostname
    except ValueError:
        port = host = None
    if parts.scheme not in ("http", "https") or not port or not host or parts.username:
        raise UsageError(f"{hide_password(url)!r} is no server URL: expected something like "
                         f"{DEFAULT_URL}" + (", without a user name: that is TORC_USERNAME, with "
                                             "TORC_PASSWORD" if parts.username else ""))
    return parts.scheme, host, port, parts.path.rstrip("/") or API_PREFIX


def hide_password(url):
    """A URL without what stands before an @, which is no business of logs."""
    return re.sub(r"//[^/@]*@", "//...@", url)


def open_connection(scheme, host, port, timeout, tls=None):
    """An http.client connection, connected. tls: {"ca_cert": FILE or None, "insecure": bool}.

    Proxy variables such as http_proxy are not looked at: compute nodes and login nodes reach each
    other directly. Raises OSError (certificates included), UsageError for a bad CA file.
    """
    import http.client
    if scheme == "https":
        import ssl
        tls = tls or {}
        try:
            context = ssl.create_default_context(cafile=tls.get("ca_cert") or None)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"the CA certificate {tls['ca_cert']} cannot be read: "
                             f"{getattr(error, 'strerror', error)}") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls.get("insecure"):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.connect()
    except OSError as error:
        greeted = connection.sock is not None        # so it is the handshake that failed
        connection.close()
        if greeted and state_of(error) == "no answer":
            import ssl
            raise ssl.SSLError("no answer to a TLS handshake") from None
        raise
    return connection


def certificate_trouble(error, host, port, tls):
    """What is wrong with a server's certificate, and what to do."""
    import ssl
    code = getattr(error, "verify_code", 0)
    if code in (9, 10):                   # X509_V_ERR_CERT_NOT_YET_VALID, ..._HAS_EXPIRED
        return (f"its certificate {'has expired' if code == 10 else 'is not valid yet'}: renew it, "
                "or look at the clocks of both machines")
    if code == 62 or "ostname mismatch" in str(error) or "IP address mismatch" in str(error):
        names = "others"
        with contextlib.suppress(OSError):           # the chain is good, so its names can be read
            import socket
            context = ssl.create_default_context(cafile=(tls or {}).get("ca_cert") or None)
            context.check_hostname = False
            with socket.create_connection((host, port), 5) as sock, context.wrap_socket(
                    sock, server_hostname=host) as inner:
                names = ", ".join(name for _, name in inner.getpeercert()["subjectAltName"])
        return f"its certificate is not for {host} but for {names}: use such a name in the URL"
    return (f"the signer of its certificate is unknown here ({error.verify_message}): name the CA "
            "with --tls-ca-cert FILE (TORC_TLS_CA_CERT)")


class Probe(NamedTuple):
    """What came of looking for a server at a URL."""

    url: str
    state: str                            # ok, or of MEANINGS
    text: str = ""                        # what it means and what to do
    server_id: str | None = None


def probe(url, server_id=None, timeout=5.0, tls=None):
    """Look whether the server with this id (or any) answers at a URL; sends no credentials."""
    import http.client
    scheme, host, port, prefix = split_url(url)
    connection = None
    try:
        connection = open_connection(scheme, host, port, timeout, tls)
        connection.request("GET", prefix + "/ping")
        found = connection.getresponse().headers.get("X-Torc-Server")
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        state = state_of(error)
        text = certificate_trouble(error, host, port, tls) if state == "certificate" \
            else MEANINGS[state]
        return Probe(url, state, text)
    finally:
        if connection:
            connection.close()
    if not found:
        return Probe(url, "not Torc", MEANINGS["not Torc"])
    if server_id and found != server_id:
        return Probe(url, "other server", MEANINGS["other server"], found)
    return Probe(url, "ok", "", found)


def race(urls, server_id=None, timeout=5.0, tls=None):
    """The Probes of some URLs, made at the same time: up to the first good one, which comes last,
    or all of them."""
    import queue
    answers = queue.Queue()
    for url in urls:                      # a name that is looked up cannot be interrupted
        threading.Thread(target=lambda url=url: answers.put(
            probe(url, server_id, timeout, tls)), daemon=True).start()
    probes = []
    for _ in urls:
        probes.append(answers.get())
        if probes[-1].state == "ok":
            break
    return probes


class Client(Calls):
    """The operations over HTTP: one kept-alive connection, Basic credentials if there are any.

    url: base URL with the path prefix (added when missing). tls: see open_connection. cookie: a
    Cookie header, for sites behind a login page. After a loss the client looks into the note that
    its server keeps in the user's home, so a restart on another port is survived; it tells every
    server which one it means, so that another one on the same port does nothing.
    """

    def __init__(self, url, user=None, password=None, tls=None, cookie=None):
        self.scheme, self.host, self.port, self.prefix = split_url(url)
        self.user = user or user_name()
        self.password, self.tls, self.cookie = password, tls, cookie
        self.others = ()                  # URLs at which the same server may be, too
        self.id = None                    # of the server, once an answer has told it
        if url == os.environ.get("TORC_API_URL"):
            self.id = os.environ.get("TORC_SERVER_ID")       # a runner has told it to its job
        self.date = None                  # header of the last answer
        self._connection = None
        self._interrupted = False
        self._used = 0.0

    @property
    def where(self):
        """The URL in use."""
        return make_url(self.scheme, self.host, self.port, self.prefix)

    def job_environment(self):
        """What a job needs to reach its workflow."""
        tls = self.tls or {}
        known = {"TORC_API_URL": self.where, "TORC_SERVER_ID": self.id,
                 "TORC_PASSWORD": self.password, "TORC_COOKIE_HEADER": self.cookie,
                 "TORC_TLS_CA_CERT": tls.get("ca_cert") and os.path.abspath(tls["ca_cert"]),
                 "TORC_TLS_INSECURE": "true" if tls.get("insecure") else None}
        return {name: value for name, value in known.items() if value}

    def clone(self):
        """Another client of the same server, for another thread."""
        other = Client(self.where, self.user, self.password, self.tls, self.cookie)
        other.id, other.others = self.id, (*self.others, self.where)
        return other

    def interrupt(self):
        """End the wait of another thread in this client: its request fails with Unreachable."""
        import socket
        self._interrupted = True
        with contextlib.suppress(OSError, AttributeError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Close the connection."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def request(self, method, path, query=None, body=None):
        """See Calls.request. Raises Unreachable when no server answers."""
        from urllib.parse import quote, urlencode
        lists = query_lists(query or {})
        target = quote(self.prefix + path) + ("?" + urlencode(lists, doseq=True) if lists else "")
        headers = {"Accept": "application/json"}
        data = None
        if body is not None:
            data = json.dumps(body, separators=(",", ":")).encode()
            headers["Content-Type"] = "application/json"
            if len(data) > MAX_BODY_BYTES:
                raise TooLarge(f"the request is {format_bytes(len(data))}, a server takes at most "
                               f"{format_bytes(MAX_BODY_BYTES)}: split the workflow")
        if self.password is not None:
            import base64
            word = f"{self.user}:{self.password}".encode()
            headers["Authorization"] = "Basic " + base64.b64encode(word).decode()
        if self.cookie:
            headers["Cookie"] = self.cookie
        if self.id:
            headers["X-Torc-Server"] = self.id
        wait_s = int((query or {}).get("wait_s") or 0)
        step = path.endswith("/runner_step")
        timeout = wait_s + 30 if wait_s or step else 300
        for _ in range(100):
            status, content_type, answer = self._send(
                method, target, data, headers, timeout, step or method == "GET")
            if status != 503 or answer != BUSY.encode():
                break
            time.sleep(0.15)              # it has not even looked at the request
        return self._decode(status, content_type, answer, path)

    def _send(self, method, target, data, headers, timeout, repeatable):
        """Send on the kept connection; again on a new one if that cannot do harm."""
        import http.client
        for again in (repeatable, False):
            fresh = self._connect(timeout)
            try:
                self._connection.request(method, target, data, headers)
                response = self._connection.getresponse()
                answer = response.read()
                told = response.headers.get("X-Torc-Server")
                if self.id and told != self.id:      # somebody else has taken its port
                    self.close()
                    if self._elsewhere(timeout) and (repeatable or response.status == 421):
                        return self._send(method, target, data, headers, timeout, repeatable)
                    now = "another Torc server" if told else "no Torc server"
                    raise Unreachable(f"{self.where} is {now} now: is ours gone? Name where it is "
                                      "with --url")
                self.id = told
                self.date = response.headers.get("Date")
                self._used = time.monotonic()
                if response.will_close:
                    self.close()
                return response.status, response.headers.get("Content-Type", ""), answer
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if not again or fresh or self._interrupted:
                    raise self._trouble(error) from None
        raise AssertionError("unreachable code")

    def _connect(self, timeout):
        """Make sure there is a connection that the server has not closed; says if it is new."""
        import select
        if self._connection and self._connection.sock:
            idle = time.monotonic() - self._used
            if idle < IDLE_S and not (idle > 0.5 and select.select(
                    [self._connection.sock], [], [], 0)[0]):
                self._connection.sock.settimeout(timeout)
                return False
        self.close()
        try:
            self._open(timeout)
        except OSError as error:
            if not self._elsewhere(timeout):
                raise self._trouble(error) from None
        return True

    def _open(self, timeout):
        self._connection = open_connection(self.scheme, self.host, self.port, min(timeout, 20),
                                           self.tls)
        self._connection.sock.settimeout(timeout)

    def _elsewhere(self, timeout):
        """Connect to where our server may be now, by the note it keeps; says if that worked.

        Never from https to http, which would tell everybody the password.
        """
        urls = [url for url in dict.fromkeys([*noted_urls(self.id), *self.others])
                if url != self.where and url.split(":")[0] in ("https", self.scheme)]
        found = race(urls, self.id, 5.0, self.tls) if self.id else None
        if not found or found[-1].state != "ok":
            return False
        self.scheme, self.host, self.port, self.prefix = split_url(found[-1].url)
        try:
            self._open(timeout)
        except OSError:
            return False
        return True

    def _trouble(self, error):
        """What went wrong, and what to do, as Unreachable."""
        state = state_of(error)
        place = f"{self.host}:{self.port}"
        if state == "certificate":
            text = f"{place}: " + certificate_trouble(error, self.host, self.port, self.tls)
        elif state == "refused" and is_loopback(self.host):
            text = (f"no server answers at {place} (connection refused): start one with `torc "
                    "server`, or name another with --url or TORC_API_URL")
        elif state == "broken":
            text = f"the connection to {place} broke: {error}"
        else:
            text = f"no server answers at {place}: {MEANINGS[state]}"
        return Unreachable(text)

    def _decode(self, status, content_type, answer, path):
        """The JSON of an answer. Raises the error that its status stands for."""
        try:
            value = json.loads(answer) if "json" in content_type else None
        except ValueError:
            value = None
        if 200 <= status < 300 and value is not None:
            return value
        if 200 <= status < 300:
            raise Unreachable(f"{self.where}: {PROXY_HINT} ({content_type or 'no content type'}): "
                              "name another with --url")
        if status == 401:
            raise Unauthorized(f"{self.where} wants a user name and password: set TORC_PASSWORD, "
                               f"or take --prompt-password (the user is {self.user}: set "
                               "TORC_USERNAME for another)")
        if not self.id and status == 404:
            raise Unreachable(f"{self.where}: {PROXY_HINT} (404): name another with --url")
        inner = value.get("error") if isinstance(value, dict) else None
        message = inner.get("message") if isinstance(inner, dict) else None
        text = answer.decode("utf-8", "replace").strip()[:500]
        raise ERROR_OF_STATUS.get(status, Internal)(
            message or text or f"{self.where} answers {path} with status {status}")


# ---- which database or server a command works on

def listening(port):
    """The rows of /proc/net/tcp and tcp6 (proc(5)), in words, of what listens on a TCP port."""
    for name in ("tcp", "tcp6"):
        for row in read_text(f"/proc/net/{name}").splitlines()[1:]:
            words = row.split()
            if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                yield words


def listeners(port):
    """[(address, uid)] of the processes of this host that listen on a TCP port."""
    import socket
    import struct
    found = []
    for words in listening(port):
        digits = words[1].partition(":")[0]          # words of four bytes in this host's order
        data = b"".join(struct.pack("=I", int(digits[at:at + 8], 16))
                        for at in range(0, len(digits), 8))
        family = socket.AF_INET if len(data) == 4 else socket.AF_INET6
        found.append((socket.inet_ntop(family, data), int(words[7])))
    return found


def default_server(how):
    """A Client for this user's own server on the default port, or None.

    It may listen on one address of this machine only. Raises Unreachable for another user's Torc
    server: using it must be said, and so must not using it.
    """
    candidates = listeners(DEFAULT_PORT)
    tls = how.get("tls")
    for scheme in ("http", "https") if candidates else ():
        for address, uid in candidates:
            host = "localhost" if address in ("0.0.0.0", "::") or is_loopback(address) else address
            url = make_url(scheme, host, DEFAULT_PORT)
            found = probe(url, None, 5.0, tls)
            if not found.server_id:
                continue                  # some other program
            if uid != os.getuid():
                raise Unreachable(f"a Torc server of another user (uid {uid}) listens on port "
                                  f"{DEFAULT_PORT}: say --url {url} to use it, or --database "
                                  f"{DEFAULT_OUTPUT_DIR}/{LOCAL_DATABASE} to work without a server")
            client = Client(url, **how)
            client.id = found.server_id
            return client
    return None


def connect(database=None, url=None, output_dir=DEFAULT_OUTPUT_DIR, how=None, tell=None,
            create=True):
    """The client of a command: database, url, this user's server at the default URL, local file.

    how: keyword arguments of Client. tell: called with one sentence that says which it was.
    create: make the local file if there is none. Raises UsageError when both are given,
    Unreachable.
    """
    database = database or (None if url else os.environ.get("TORC_DATABASE"))
    url = url or (None if database else os.environ.get("TORC_API_URL"))
    if database and url:
        raise UsageError("--database and --url exclude each other: name one of them")
    tell = tell or (lambda sentence: None)
    if url:
        client = Client(url, **(how or {}))
        tell(f"using the server {client.where}")
        return client
    server = None if database else default_server(how or {})
    if server:
        tell(f"using your server {server.where}")
        return server
    path = database or os.path.join(output_dir, LOCAL_DATABASE)
    if not os.path.exists(path):
        if not create:
            raise Unreachable(f"there is no database {path} yet: `torc run SPEC` or `torc create "
                              "SPEC` makes it; name another with --database, or a server with "
                              "--url")
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    tell(f"using the local database {path}")
    return LocalClient(path)


# ==================================================================================================
# 10 Runner
# ==================================================================================================
# One thread spawns and reaps (the main thread, woken by SIGCHLD through a pipe, never by a timer),
# one talks to the server, one listens for news, one samples what the jobs use. The first two share
# a deque of claimed jobs and a list of completions, under one lock.

PREFETCH_LIMIT = 16
ENOUGH_AHEAD = 4                          # jobs in the queue that allow completions to be gathered
GATHER_S = 0.01                           # for so long
PREFETCH_S = 0.1                          # work for this long is claimed ahead at the recent rate
GIVE_BACK_S = 0.5                         # a prefetched job not started by then goes back
RUNTIME_GRACE_S = 120                     # by which a requirement's runtime may exceed what is left
STOP_LEAD_S = 10.0                        # at most, from SIGTERM to SIGKILL when a job is stopped
SUBREAPER = 36                            # PR_SET_CHILD_SUBREAPER, linux/prctl.h
MACHINE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EAGAIN, errno.ENOMEM,
                  errno.EMFILE, errno.ENFILE, errno.ESTALE}     # no job can be blamed for these
JOB_TRIGGERS = ("on_jobs_ready", "on_jobs_complete")
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
                 "TORC_GPU_VISIBLE_DEVICES")
TOO_LONG = 131_071                        # bytes of one argument: MAX_ARG_STRLEN, execve(2)


class RunOptions(NamedTuple):
    """How a runner is to run. end_time: seconds since the epoch; None for what is detected."""

    output_dir: str = DEFAULT_OUTPUT_DIR
    max_parallel_jobs: int | None = None
    num_cpus: int | None = None
    memory_gb: float | None = None
    num_gpus: int | None = None
    end_time: float | None = None
    quiet: bool = False
    schedule: Any = None                  # function(client, action) that submits its allocations


# ---- what this machine has

def cgroup_values(controller, name_v1, name_v2):
    """Values of a limit file from our cgroup up to the root (cgroups(7)); v1 has one, v2 many."""
    for line in read_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            while True:
                yield read_text(f"/sys/fs/cgroup{path}/{name_v2}")
                if path in ("", "/"):
                    break
                path = os.path.dirname(path)
        elif controller in controllers.split(","):
            yield read_text(f"/sys/fs/cgroup/{controller}{path}/{name_v1}")


def usable_cpus():
    """CPUs this process may use: affinity, then the quota of its cgroups."""
    cpus = float(len(os.sched_getaffinity(0)))
    for text in cgroup_values("cpu", "cpu.cfs_quota_us", "cpu.max"):
        words = text.split()
        if words and words[0].isdigit():
            cpus = min(cpus, int(words[0]) / int(words[1] if len(words) > 1 else 100_000))
    return max(1, int(cpus))


def usable_memory():
    """Bytes of memory this process may use: the machine's, then the limits of its cgroups."""
    match = re.search(r"MemTotal:\s+(\d+) kB", read_text("/proc/meminfo"))
    memory = int(match[1]) * 1024 if match else 2**30
    for text in cgroup_values("memory", "memory.limit_in_bytes", "memory.max"):
        if text.isdigit():
            memory = min(memory, int(text))
    return memory


def usable_gpus():
    """Ids of the GPUs this process may use, as texts."""
    import shutil
    import subprocess
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if os.environ.get(name) is not None:
            words = [word.strip() for word in os.environ[name].split(",")]
            # CUDA sees the devices before the first that is none: -1, NoDevFiles, an empty word.
            return list(itertools.takewhile(re.compile(r"\d+$|(GPU|MIG)-\S+$").match, words))
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True,
                                    timeout=10)
            return re.findall(r"^GPU (\d+):", listed.stdout, re.M)
    return []


def boot_id():
    """Identifies this start of this machine's kernel."""
    return read_text("/proc/sys/kernel/random/boot_id")


def process_start(pid):
    """When a process started, in clock ticks since boot (field 22 of proc(5) stat), or None."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
        return None if words[0] in (b"Z", b"X") else int(words[19])
    except (OSError, ValueError, IndexError):
        return None


# ---- ending processes

def marked_processes(token, job_id=None):
    """pids of this user's processes whose environment names the runner (and the job)."""
    wanted = [f"TORC_RUNNER={token}".encode()]
    if job_id is not None:
        wanted.append(f"TORC_JOB_ID={job_id}".encode())
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/environ", "rb") as file:
                    words = file.read().split(b"\0")
                if all(word in words for word in wanted):
                    found.append(int(name))
    return found


def has_exited(pid):
    """Whether a child of ours has ended, reaped or not (waitid(2))."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def signal_group(pid, number):
    """Signal a process group that we made; says whether anything of it lives."""
    import signal
    try:
        os.killpg(pid, number)
        os.killpg(pid, signal.SIGCONT)    # a stopped job must wake to see the signal
        return True
    except (ProcessLookupError, PermissionError):
        return False


def started_about(pid, seconds):
    """Whether a process began about then (seconds since boot), or is gone while its group lives."""
    ticks = process_start(pid)
    return ticks is None or abs(ticks / os.sysconf("SC_CLK_TCK") - seconds) < 2


def kill_leftovers(token, leaders, seconds=10.0):
    """SIGKILL what is left of a dead runner: its process groups, and what its mark is found on.

    leaders: (pid, seconds from boot to its start) of group leaders; a number that another process
    has taken over is spared.
    """
    import signal
    deadline = time.monotonic() + seconds
    groups = {pid for pid, started in leaders if started_about(pid, started)}
    while time.monotonic() < deadline:
        marked = [pid for pid in marked_processes(token) if pid != os.getpid()]
        for pid in marked:                # its group too: the runner may have died before noting it
            with contextlib.suppress(OSError):
                groups |= {os.getpgid(pid)} - {os.getpgid(0)}
                os.kill(pid, signal.SIGKILL)
        alive = [pid for pid in groups if signal_group(pid, signal.SIGKILL)]
        if not marked and not any(group_lives(pid) for pid in alive):
            return
        time.sleep(0.02)                  # nothing tells us when a stranger's child is gone


def group_lives(pgid):
    """Whether a process group has a member that is not a zombie."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                with open(f"/proc/{name}/stat", "rb") as file:
                    words = file.read().rpartition(b")")[2].split()
                if int(words[2]) == pgid and words[0] not in (b"Z", b"X"):
                    return True
    return False


def start_guardian(journal_path, token):
    """Fork a process that ends the jobs if this one is killed; returns (its pid, our pipe end).

    It waits for the pipe to hang up, which costs nothing. A byte in the pipe is a clean goodbye.
    To be called before there are threads.
    """
    import select
    import signal
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read_end)
        return pid, write_end
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.dup2(read_end, 3)
        os.closerange(4, 4096)
        poller = select.poll()
        poller.register(3, 0)             # POLLHUP comes without being asked for
        poller.poll()
        if not os.read(3, 1):
            kill_leftovers(token, journal_leaders(journal_path))
    finally:
        os._exit(0)


# ---- the journal

class Journal:
    """What this runner has started and what has ended, for whoever comes after it if it dies.

    A line of JSON for each: the header, {"start": [job, run, attempt]} before a process is
    made, {"pid": [pid, seconds since boot]} after, {"end": completion}, {"ok": [[job, run,
    attempt], ...]} once the server has confirmed. 0600. Records are gathered until flush().
    """

    def __init__(self, path, header):
        self.path = path
        self._told = False
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._lines = []
        self._lock = threading.Lock()
        self.add({"header": header})
        self.flush()

    def add(self, record):
        """Append a record at the next flush."""
        with self._lock:
            self._lines.append(compact(record) + "\n")

    def flush(self):
        """Write what was added; a full disk is told once and does not stop the jobs."""
        if not self._lines:
            return
        with self._lock:
            lines, self._lines = self._lines, []
            try:
                os.write(self.fd, "".join(lines).encode())
            except OSError as error:
                if not self._told:
                    print(f"torc: journal {self.path}: {error.strerror}: if this runner is killed "
                          "now, results may be lost", file=sys.stderr)
                self._told = True

    def close(self, remove):
        """Close it, and remove it when the server knows everything."""
        self.flush()
        os.close(self.fd)
        if remove:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def read_journal(path):
    """Records of a journal; a last line cut short by a crash is passed over."""
    records = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records


def journal_leaders(path):
    """(pid, start) of every process group that a journal names."""
    return [tuple(record["pid"]) for record in read_journal(path) if "pid" in record]


def replay_journal(client, records):
    """Tell the server what a dead runner did not get to say; returns the number of completions."""
    header = records[0]["header"]
    confirmed = {tuple(key) for record in records for key in record.get("ok", ())}
    ends = {(end["job_id"], end["run_id"], end["attempt_id"]): end
            for end in (record["end"] for record in records if "end" in record)}
    starts = [record["start"] for record in records if "start" in record]
    unsaid = [end for key, end in ends.items() if key not in confirmed]
    client.post(f"/workflows/{header['workflow_id']}/runner_step", {
        "compute_node_id": header["compute_node_id"], "step": 0, "replay": True, "held": [],
        "starts": [{"job_id": job, "attempt_id": attempt} for job, run, attempt in starts
                   if (job, run, attempt) not in confirmed],
        "completions": unsaid})
    return len(unsaid)


def is_dead_here(record):
    """Proof that the runner of a compute node (or journal header) is gone: this host, this boot,
    and its pid is free or belongs to a younger process."""
    import socket
    return (record.get("hostname") == socket.gethostname() and record.get("boot_id") == boot_id()
            and record.get("pid_started") is not None
            and process_start(record["pid"]) != record["pid_started"])


def release_dead_nodes(client, workflow_id, output_dir):
    """Clean up behind runners of this host that were killed; returns what was done, in sentences.

    Ends what lives of their jobs, replays their journals, makes their jobs ready again.
    """
    said = []
    nodes = {node["id"]: node for node in client.items(
        "/compute_nodes", workflow_id=workflow_id, is_active=True) if is_dead_here(node)}
    directories = {os.path.abspath(output_dir)} | {
        node["output_dir"] for node in nodes.values() if node.get("output_dir")}
    server_id = client.server_id()
    for directory in sorted(directories):
        for path in journals_in(directory, server_id, workflow_id):
            said += clean_up(client, path, nodes)
    for node in nodes.values():
        requeued = client.post(f"/compute_nodes/{node['id']}/release")["requeued"]
        said.append(f"the runner with pid {node['pid']} had died" + (
            f": {plural(len(requeued), 'job')} of its are ready again" if requeued else ""))
    return said


def journals_in(directory, server_id, workflow_id):
    """Paths of the journals of a workflow of this very database."""
    folder = os.path.join(directory, "journal")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names
            if name.startswith(f"{server_id}_wf{workflow_id}_n")]


def clean_up(client, path, nodes):
    """One journal: if its runner is dead, end its processes, replay it and remove it."""
    records = read_journal(path)
    if not records or "header" not in records[0]:
        return []
    header = records[0]["header"]
    if not is_dead_here(header):
        return []
    kill_leftovers(header["token"], journal_leaders(path))
    try:
        number = replay_journal(client, records)
    except NotFound:
        number = 0                        # workflow or node was deleted: nobody wants it
    with contextlib.suppress(FileNotFoundError):        # another successor was as quick
        os.unlink(path)
    return [f"{plural(number, 'result')} of the runner with pid {header['pid']}, which had died, "
            f"{'was' if number == 1 else 'were'} handed in"] if number else []


# ---- room for jobs

class Need(NamedTuple):
    """What a job takes while it runs; of each node if there are several."""

    cpus: int
    memory: int                           # bytes
    gpus: int
    nodes: int


def read_need(record):
    """The Need of a record of resource requirements."""
    return Need(record["num_cpus"], parse_memory(record["memory"]), record["num_gpus"],
                record["num_nodes"])


class Room:
    """What is free on the nodes of a runner, nearly always one. Jobs of one node go where they fit
    first, jobs of several take idle nodes whole.

    most: so many jobs at a time, whatever they need; None: as many as fit.
    """

    def __init__(self, nodes, whole, most=None):
        self.whole = whole                # (cpus, memory_bytes, gpus) of a node
        self.free = [whole] * nodes
        self.most = most
        self.number = 0                   # of jobs at work

    def copy(self):
        """Another Room like this one."""
        other = Room(0, self.whole, self.most)
        other.free, other.number = list(self.free), self.number
        return other

    def place(self, need):
        """Take room for a job; returns the indexes of its nodes, or None if there is none."""
        if self.most:
            if self.number >= self.most:
                return None
            places = []
        elif need.nodes > 1:
            places = [index for index, free in enumerate(self.free) if free == self.whole]
            if len(places) < need.nodes:
                return None
            places = places[:need.nodes]
        else:
            places = next(([index] for index, free in enumerate(self.free)
                           if need.cpus <= free[0] and need.memory <= free[1]
                           and need.gpus <= free[2]), None)
            if places is None:
                return None
        self.number += 1
        for index in places:
            self._shift(index, need, -1)
        return places

    def leave(self, need, places):
        """A job that was placed has ended."""
        self.number -= 1
        for index in places:
            self._shift(index, need, 1)

    def _shift(self, index, need, sign):
        if need.nodes > 1:
            self.free[index] = self.whole if sign > 0 else (0, 0, 0)
        else:
            cpus, memory, gpus = self.free[index]
            self.free[index] = (cpus + sign * need.cpus, memory + sign * need.memory,
                                gpus + sign * need.gpus)


# ---- one job's process

class Child:
    """A job that has been started here: its process and what is known of it."""

    def __init__(self, job, need, places, stdio, gpus):
        self.job = job
        self.need = need                  # its Need,
        self.places = places              # and the nodes it has
        self.stdio = stdio                # {"mode", "delete_on_success"}
        self.gpus = gpus
        self.step = None                  # name of its step of srun, if it is one
        self.environment = None           # for a recovery script
        self.pid = 0
        self.started = 0.0
        self.verdict = None               # why we end it: stop, timeout, oom, interrupt
        self.status = None                # for stop: the status the server wants
        self.kill_at = None               # monotonic time of SIGKILL
        self.note = ""                    # for the tail of its stderr
        self.limit = None                 # bytes, enforced by the sampler
        self.memory = []                  # samples: bytes
        self.cpu = []                     # samples: percent
        self.ticks = None                 # (monotonic, CPU ticks) of the last sample

    @property
    def key(self):
        """(job, run, attempt)."""
        return self.job["id"], self.job["run_id"], self.job["attempt_id"]


def tail_of(path):
    """The last bytes of a file as text."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - STDERR_TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


class Stdio:
    """Where a job's output goes; opened in Python, since posix_spawn would hold every thread up
    while a file system hangs."""

    def __init__(self, directory, workflow_id, key, mode):
        names = {"separate": ("o", "e"), "combined": ("log", "log"), "no_stdout": (None, "e"),
                 "no_stderr": ("o", None), "none": (None, None)}[mode]
        self.paths = [ending and os.path.join(directory, stdio_name(workflow_id, *key, ending))
                      for ending in names]

    def open(self, null):
        """File descriptors for stdout and stderr. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        out = os.open(self.paths[0], flags, 0o666) if self.paths[0] else null
        if self.paths[1] == self.paths[0]:
            return out, out
        try:
            return out, os.open(self.paths[1], flags, 0o666) if self.paths[1] else null
        except OSError:
            if out != null:
                os.close(out)
            raise

    def delete(self):
        """Remove the files."""
        for path in filter(None, set(self.paths)):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def error_path(self):
        """The file that has the job's stderr, or None."""
        return self.paths[1]


class Limits(NamedTuple):
    """execution_config and resource_monitor_config of a workflow, with defaults."""

    sigkill_headroom_s: float
    sigterm_lead_s: float
    timeout_exit_code: int
    oom_exit_code: int
    termination_signal: int
    limit_resources: bool
    stdio: dict
    monitor: bool
    time_series: bool
    sample_interval_s: float


def read_limits(workflow):
    """Limits from a workflow record."""
    import signal
    config = json.loads(workflow.get("execution_config") or "{}")
    monitor = json.loads(workflow.get("resource_monitor_config") or "{}")
    name = config.get("termination_signal", "SIGTERM")
    enabled = monitor.get("enabled", True)
    return Limits(
        config.get("sigkill_headroom_seconds", 60), config.get("sigterm_lead_seconds", 30),
        config.get("timeout_exit_code", 152), config.get("oom_exit_code", 137),
        getattr(signal, name, signal.SIGTERM), config.get("limit_resources", True),
        {"mode": "separate", "delete_on_success": False, **config.get("stdio", {})},
        enabled, enabled and str(monitor.get("granularity", "")).lower() == "time_series",
        monitor.get("sample_interval_seconds", 10))


# ---- what the jobs use

class Sampler:
    """Looks once a second at memory and CPU of the jobs; ends those over their memory limit."""

    def __init__(self, runner):
        self.runner = runner
        self.page = os.sysconf("SC_PAGE_SIZE")
        self.tick = os.sysconf("SC_CLK_TCK")
        self.series = None
        self.series_at = 0.0

    def loop(self):
        """Until the runner ends."""
        while not self.runner.ended.wait(1.0):
            children = list(self.runner.children.values())
            if children:
                with contextlib.suppress(OSError):
                    self.sample(children, time.monotonic())

    def sample(self, children, now):
        """One look at all processes."""
        stats = self.processes()
        owner = {child.pid: child for child in children}
        used = {}                         # child: [anonymous bytes, largest shared, ticks, number]
        for pid, (parent, session, ticks) in stats.items():
            child = owner.get(session) or self.ancestor(pid, stats, owner)
            if child:
                total = used.setdefault(child, [0, 0, 0, 0])
                resident, shared = self.memory(pid)
                total[0] += resident - shared
                total[1] = max(total[1], shared)
                total[2] += ticks
                total[3] += 1
        for child, (anonymous, shared, ticks, _) in used.items():
            self.note(child, anonymous + shared, ticks, now)
        limits = self.runner.limits
        if limits.time_series and now - self.series_at >= limits.sample_interval_s:
            self.series_at = now
            self.write_series(used)

    def processes(self):
        """{pid: (parent, session, CPU ticks)} of all processes."""
        stats = {}
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    with open(f"/proc/{name}/stat", "rb") as file:
                        words = file.read().rpartition(b")")[2].split()
                    stats[int(name)] = (int(words[1]), int(words[3]),
                                        int(words[11]) + int(words[12]))
        return stats

    def ancestor(self, pid, stats, owner):
        """The job among a process's ancestors, or None."""
        for _ in range(64):
            pid = stats.get(pid, (0,))[0]
            if pid <= 1:
                return None
            if pid in owner:
                return owner[pid]
        return None

    def memory(self, pid):
        """(resident, shared) bytes of a process."""
        words = read_text(f"/proc/{pid}/statm").split()
        return (int(words[1]) * self.page, int(words[2]) * self.page) if words else (0, 0)

    def note(self, child, memory, ticks, now):
        """Keep a sample; end the job if it is over its limit."""
        child.memory.append(memory)
        if child.ticks and now > child.ticks[0]:
            spent = (ticks - child.ticks[1]) / self.tick / (now - child.ticks[0])
            child.cpu.append(max(0.0, 100 * spent))
        child.ticks = (now, ticks)
        if child.limit and memory > child.limit and not child.verdict:
            self.runner.out_of_memory(child, memory)

    def write_series(self, used):
        """Append a sample of each job to the time series database."""
        import sqlite3
        runner = self.runner
        try:
            if self.series is None:
                self.series = self.open_series()
            now = time.time()
            for child, (anonymous, shared, _, number) in used.items():
                job = child.job
                self.series.execute("INSERT OR REPLACE INTO job_resource_samples VALUES"
                                    " (?, ?, ?, ?, ?)", (job["id"], now, (child.cpu or [0.0])[-1],
                                                         anonymous + shared, number))
                self.series.execute("INSERT OR IGNORE INTO job_metadata VALUES (?, ?)",
                                    (job["id"], job["name"]))
            self.series.commit()
        except (sqlite3.Error, OSError) as error:
            runner.say(f"time series of resources are not written: {error}")
            runner.limits = runner.limits._replace(time_series=False)

    def open_series(self):
        """The database of samples, made with the tables that Torc's plots read."""
        import sqlite3
        runner = self.runner
        folder = os.path.join(runner.directory, "resource_utilization")
        os.makedirs(folder, exist_ok=True)
        series = sqlite3.connect(os.path.join(folder, f"resource_metrics_{runner.labels()[1]}.db"),
                                 check_same_thread=False)
        series.execute("CREATE TABLE IF NOT EXISTS job_resource_samples (job_id INTEGER,"
                       " timestamp REAL, cpu_percent REAL, memory_bytes INTEGER,"
                       " num_processes INTEGER, PRIMARY KEY (job_id, timestamp))")
        series.execute("CREATE INDEX IF NOT EXISTS samples_job ON job_resource_samples (job_id)")
        series.execute("CREATE TABLE IF NOT EXISTS job_metadata (job_id INTEGER PRIMARY KEY,"
                       " job_name TEXT)")
        return series


# ---- progress

class Progress:
    """What the user sees while a runner works: a redrawn line on a terminal, else lines."""

    def __init__(self, quiet, log_path):
        self.terminal = sys.stderr.isatty() and not quiet and os.environ.get("TERM") != "dumb"
        self.color = self.terminal and "NO_COLOR" not in os.environ
        self.quiet = quiet
        self.counts = {}
        self.began = time.monotonic()
        self.drawn = 0.0
        self.told = (self.began, None)
        self.finished_at_start = None
        self.lock = threading.Lock()
        self.log = open(log_path, "a", encoding="utf-8", errors="replace", buffering=1)

    def say(self, text):
        """A line for the user and the log."""
        with self.lock, contextlib.suppress(OSError, ValueError):
            self.log.write(f"[{iso_time(time.time())}] {text}\n")
            if not self.quiet:
                clear = "\r\x1b[K" if self.terminal and self.drawn else ""
                print(f"{clear}torc: {text}", file=sys.stderr, flush=True)

    def update(self, counts):
        """New counts by status."""
        self.counts = counts
        if self.finished_at_start is None:
            self.finished_at_start = self.finished()
        if not self.terminal and not self.quiet:
            now = time.monotonic()
            text = self.summary()
            if now - self.told[0] >= 10 and text != self.told[1]:
                self.told = (now, text)
                self.say(text)

    def finished(self):
        """Jobs that need no more work."""
        return sum(self.counts.get(name, 0) for name in
                   ("completed", "failed", "canceled", "terminated", "disabled"))

    def summary(self):
        """The counts that are not zero, in words."""
        parts = [f"{self.counts[name]} {name.replace('_', ' ')}" for name in STATUS_NAMES
                 if self.counts.get(name)]
        return ", ".join(parts) or "no jobs"

    def draw(self, force=False):
        """Redraw the line, at most five times a second."""
        now = time.monotonic()
        if not self.terminal or not self.counts or (now - self.drawn < 0.2 and not force):
            return
        self.drawn = now
        width = os.get_terminal_size(2).columns if os.isatty(2) else 80
        total, done = self.counts.get("total", 0), self.finished()
        share = done / total if total else 1.0
        rate = (done - (self.finished_at_start or 0)) / max(now - self.began, 0.001)
        left = f", {format_duration((total - done) / rate)} left" if rate and done < total else ""
        text = f"] {done}/{total}, {self.summary()}, {rate:.1f}/s{left}"
        room = max(4, min(30, width - len(text) - 3))
        filled = int(share * room)
        bar = "#" * filled + "." * (room - filled)
        if self.color:
            bar = f"\x1b[3{'1' if self.counts.get('failed') else '2'}m{bar}\x1b[0m"
        with self.lock, contextlib.suppress(OSError, ValueError):
            sys.stderr.write("\r\x1b[K[" + bar + text[:max(0, width - room - 2)])
            sys.stderr.flush()

    def finish(self):
        """Draw the line for the last time; what is said from now on stands below it."""
        self.draw(force=True)
        with self.lock, contextlib.suppress(OSError, ValueError):
            if self.terminal and self.drawn:
                sys.stderr.write("\n")
                sys.stderr.flush()
            self.terminal = False

    def close(self):
        """The end."""
        self.finish()
        self.log.close()


# ---- the runner

class Runner:
    """Runs jobs of one initialized workflow on this machine until nothing is left to do.

    run() must be called in the main thread, since it receives signals.
    """

    def __init__(self, client, workflow_id, options=RunOptions()):
        import collections
        import secrets
        import socket
        self.client = client
        self.workflow_id = workflow_id
        self.options = options
        self.directory = os.path.abspath(options.output_dir)
        self.host = socket.gethostname()
        self.token = secrets.token_hex(8)
        self.lock = threading.Lock()
        self.talk = threading.Condition(self.lock)   # wakes the talker
        self.queue = collections.deque()             # (claimed job, when): not started
        self.children = {}                           # pid: Child
        self.ending = {}                             # key: job whose end is being worked out
        self.scripts = {}                            # Popen of actions and recoveries: when to kill
        self.acting = False                          # a thread runs actions
        self.tried_actions, self.said_action = set(), False
        self.looked_at = None                        # generation at which actions were looked at
        self.gave_up = False                         # it is this runner that failed
        self.starts, self.returns = [], []
        self.done = []                               # completions the server has not confirmed
        self.ends = collections.deque(maxlen=32)     # when the last jobs ended
        self.needs = {}                              # requirement id: record
        self.code = None                             # exit code once decided
        self.ended = threading.Event()
        self.interrupted = 0                         # signal number
        self.leave_at = None                         # then the server is waited for no more:
        self.tired = False
        self.bury_at = 0.0                           # when to look for dead orphans
        self.fault = None                            # why this machine cannot start jobs,
        self.retry_at = 0.0                          # and when it tries again
        self.draining = False                        # no more starts
        self.gone = False                            # the workflow was deleted
        self.news = True                             # worth asking for jobs
        self.situation = {}                          # the server's last answer
        self.step = 0
        self.wake_pipe = os.pipe()

    # -- life

    def run(self):
        """Run; returns the exit code: 0, 1, 3, or 128 + signal."""
        import shutil
        sys.setswitchinterval(0.0001)     # each system call of the spawner waits that long
        os.makedirs(os.path.join(self.directory, "job_stdio"), exist_ok=True)
        os.makedirs(os.path.join(self.directory, "journal"), mode=0o700, exist_ok=True)
        for name in ("", "job_stdio", "journal"):
            folder = os.path.join(self.directory, name)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise TorcError(f"{folder} cannot be written by you: make it writable, or name "
                                "another --output-dir")
        self.bash = shutil.which("bash")
        if not self.bash:
            raise TorcError("there is no bash on the PATH, which runs the commands of jobs")
        workflow = self.client.get(f"/workflows/{self.workflow_id}")
        self.run_id = self.client.get(f"/workflows/{self.workflow_id}/status")["run_id"]
        self.workflow = workflow
        self.limits = read_limits(workflow)
        self.progress = Progress(self.options.quiet, os.path.join(
            self.directory, f"job_runner_{self.labels()[0]}.log"))
        self.say = self.progress.say
        for sentence in release_dead_nodes(self.client, self.workflow_id, self.directory):
            self.say(sentence)
        self._detect()
        self._signals()
        self._register()
        try:
            self._work()
        finally:
            self._leave()
        return self.code

    def labels(self):
        """What tells this runner's log and its time series from those of others."""
        return (f"{self.host}_wf{self.workflow_id}_r{self.run_id}",
                f"wf{self.workflow_id}_h{self.host}_r{self.run_id}")

    def _detect(self):
        """What may be used here, and until when."""
        options = self.options
        self.cpus = options.num_cpus or usable_cpus()
        self.memory = int((options.memory_gb * 2**30) if options.memory_gb else usable_memory())
        gpus = usable_gpus()
        if options.num_gpus is not None:
            gpus = (gpus + [str(number) for number in range(len(gpus), options.num_gpus)])[
                :options.num_gpus]
        self.gpus = gpus
        self.free_gpus = list(gpus)
        self.room = Room(1, (self.cpus, self.memory, len(gpus)), options.max_parallel_jobs)
        self.end_time = None
        if options.end_time:
            self._end_in(options.end_time - time.time())

    def _end_in(self, left):
        """There are so many seconds left."""
        self.end_time = time.monotonic() + left
        share = max(left, 0) / 4          # a short limit must leave time to work
        self.limits = self.limits._replace(
            sigkill_headroom_s=min(self.limits.sigkill_headroom_s, share),
            sigterm_lead_s=min(self.limits.sigterm_lead_s, share))

    def _register(self):
        """The compute node's record, the journal and the guardian; no thread exists yet."""
        identity = {"hostname": self.host, "pid": os.getpid(), "boot_id": boot_id(),
                    "pid_started": process_start(os.getpid())}
        self.node_id = self.client.post("/compute_nodes", {
            **identity, "workflow_id": self.workflow_id, "start_time": iso_time(time.time()),
            "num_cpus": self.cpus, "memory_gb": round(self.memory / 2**30, 3),
            "num_gpus": len(self.gpus), "num_nodes": len(self.room.free),
            "compute_node_type": "local", "is_active": True, "output_dir": self.directory,
            **self._node_values()})["id"]
        server_id = self.client.server_id()
        self.journal = Journal(
            os.path.join(self.directory, "journal",
                         f"{server_id}_wf{self.workflow_id}_n{self.node_id}.jsonl"),
            {**identity, "server_id": server_id, "workflow_id": self.workflow_id,
             "compute_node_id": self.node_id, "run_id": self.run_id, "token": self.token})
        self.guardian, self.guardian_pipe = start_guardian(self.journal.path, self.token)
        self._environment()
        slots = (f"{self.options.max_parallel_jobs} jobs at a time" if
                 self.options.max_parallel_jobs else
                 f"{self.cpus} CPUs, {format_bytes(self.memory)}, {len(self.gpus)} GPUs")
        if len(self.room.free) > 1:
            slots = f"{len(self.room.free)} nodes of {slots}"
        self.say(f"running workflow {self.workflow_id} \"{self.workflow['name']}\" with {slots}; "
                 f"output in {self.options.output_dir}")

    def _node_values(self):
        """What else the record of this compute node says."""
        return {}

    def _environment(self):
        """What all jobs get in their environment."""
        self.base_environment = {
            **os.environ, "TORC_WORKFLOW_ID": str(self.workflow_id),
            "TORC_OUTPUT_DIR": self.directory, "TORC_RUNNER": self.token}
        if not self.client.is_local:
            self.base_environment.pop("TORC_DATABASE", None)

    def _work(self):
        """The threads, then the loop."""
        self._become_subreaper()
        handlers = [rule for rule in self.client.items(
            f"/workflows/{self.workflow_id}/failure_handlers")]
        self.handlers = {handler["id"]: json.loads(handler["rules"]) for handler in handlers}
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.lease_at = time.monotonic()
        self.waiting = self.client.clone()
        threads = [threading.Thread(target=target, daemon=True) for target in (
            self._talker, self._listener, Sampler(self).loop)]
        if not self.limits.monitor:
            threads.pop()
        for thread in threads:
            thread.start()
        self._loop()
        self.ended.set()
        self.waiting.interrupt()
        for thread in threads:            # none may be at work when the interpreter ends
            thread.join(10)

    def _become_subreaper(self):
        """Orphans of jobs become our children, so that none escapes unseen (prctl(2))."""
        with contextlib.suppress(OSError, AttributeError, ImportError):
            import ctypes
            ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)

    def _signals(self):
        """Signals only write a byte to the wake-up pipe; the loop looks what it was."""
        import signal
        for end in self.wake_pipe:
            os.set_blocking(end, False)
        self.received = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:      # nohup, a script's background
                signal.signal(number, lambda number, frame: self.received.append(number))
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self.wake_pipe[1], warn_on_full_buffer=False)

    def wake(self):
        """Wake the loop from another thread."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.wake_pipe[1], b"\0")

    def _leave(self):
        """Good-bye to guardian and journal."""
        import signal
        signal.set_wakeup_fd(-1)
        self.ended.set()
        complete = self.gone or self.code is not None and not self.done and not self.ending
        with contextlib.suppress(OSError):
            os.write(self.guardian_pipe, b"q" if not self.children else b"")
        os.close(self.guardian_pipe)
        with contextlib.suppress(OSError):
            os.waitpid(self.guardian, 0)
        self.journal.close(remove=complete)
        self.progress.close()

    # -- the spawning thread

    def _loop(self):
        """Until the talker has decided and no process is left."""
        import select
        poller = select.poll()
        poller.register(self.wake_pipe[0], select.POLLIN)
        while self.code is None or self.children:
            self._reap()
            self._handle_signals()
            self._enforce(time.monotonic())
            self._launch()
            self.journal.flush()
            self.progress.draw()
            poller.poll(self._patience())
            with contextlib.suppress(BlockingIOError):
                while len(os.read(self.wake_pipe[0], 4096)) == 4096:
                    pass

    def _patience(self):
        """Milliseconds until something is due by the clock, None for never."""
        now = time.monotonic()
        due = [child.kill_at for child in list(self.children.values()) if child.kill_at]
        with self.lock:
            due += filter(None, [*self.scripts.values(), self.leave_at])
        if self.end_time and not self.draining:
            due.append(self.end_time - self.limits.sigkill_headroom_s - self.limits.sigterm_lead_s)
        if self.retry_at > now:
            due.append(self.retry_at)
        if self.progress.terminal:
            due.append(now + 0.2)
        # poll(2) takes an int: a limit of months is looked at once a day.
        return max(0, min(86_400_000, int(1000 * (min(due) - now)) + 1)) if due else None

    def _handle_signals(self):
        import signal
        while self.received:
            number = self.received.pop(0)
            if self.interrupted:          # the second one: at once
                for child in list(self.children.values()):
                    child.kill_at = time.monotonic()
                self._end_scripts(signal.SIGKILL)
                continue
            self.interrupted = number
            self.say(f"signal {number}: ending {len(self.children)} running jobs; they will be "
                     "ready again")
            self._drain()
            self._end_scripts(signal.SIGTERM)
            for child in list(self.children.values()):
                self._end(child, "interrupt")
        if self.interrupted:
            with self.talk:
                self.talk.notify()

    def _drain(self):
        """No more starts; what is queued goes back."""
        with self.talk:
            self.draining = True
            self.returns += [job for job, _ in self.queue]
            self.queue.clear()
            self.talk.notify()

    def _end_scripts(self, number):
        """Signal the commands of actions and the recovery scripts that are at work; SIGKILL is to
        follow."""
        with self.lock:
            for process in self.scripts:
                self.scripts[process] = time.monotonic() + STOP_LEAD_S
                if process.poll() is None:
                    signal_group(process.pid, number)
        self.wake()

    def _run_script(self, script, path, environment, last=False, cwd=None):
        """Run a script of the workflow's with its output appended to a file; its return code.

        None: not begun, since the runner is about to leave and it is not one of the last words.
        """
        import subprocess
        with open(path, "ab") as file:
            with self.lock:               # _drain comes before, or else finds it in the set
                if self.draining and not last:
                    return None
                process = subprocess.Popen(
                    [self.bash, "-c", script], cwd=cwd, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=file, start_new_session=True, env=environment)
                self.scripts[process] = None
            code = process.wait()
        with self.lock:
            del self.scripts[process]
        return code

    def _end(self, child, verdict, status=None, lead=None):
        """Ask a job to end; SIGKILL follows after the lead."""
        if child.verdict or has_exited(child.pid):
            return
        child.verdict, child.status = verdict, status
        lead = min(self.limits.sigterm_lead_s, STOP_LEAD_S) if lead is None else lead
        child.kill_at = time.monotonic() + lead
        self._signal(child, self.limits.termination_signal)

    def _signal(self, child, number):
        """Signal a job's process group, and what has left that but bears its mark."""
        signal_group(child.pid, number)
        for pid in marked_processes(self.token, child.job["id"]):
            with contextlib.suppress(OSError):
                if os.getpgid(pid) != child.pid:
                    os.kill(pid, number)

    def _enforce(self, now):
        """SIGKILL where the lead is over; the time limit; what the server wants ended."""
        import signal
        for child in list(self.children.values()):
            if child.kill_at and now >= child.kill_at:
                self._signal(child, signal.SIGKILL)
                child.kill_at = now + 5   # until it is gone
        with self.lock:
            for process, kill_at in self.scripts.items():
                if kill_at and now >= kill_at:
                    signal_group(process.pid, signal.SIGKILL)
                    self.scripts[process] = now + 5
            leaving = self.interrupted and not self.children and not self.scripts
            self.leave_at = (self.leave_at or now + STOP_LEAD_S) if leaving else None
        if self.leave_at and now >= self.leave_at:
            self.leave_at, self.tired = now + 1, True
            self.client.interrupt()       # a frozen server must not hold us
        limits = self.limits
        if self.end_time and not self.draining and (
                now >= self.end_time - limits.sigkill_headroom_s - limits.sigterm_lead_s):
            if self.children:
                self.say(f"the time limit is near: ending {len(self.children)} running jobs")
            self._drain()
            self._end_scripts(signal.SIGTERM)
            for child in list(self.children.values()):
                self._end(child, "timeout", lead=limits.sigterm_lead_s)

    def out_of_memory(self, child, used):
        """Called by the sampler: a job is over its memory limit."""
        import signal
        name = self.needs[child.job["resource_requirements_id"]]["name"]
        child.note = (f"torc: killed: used {format_bytes(used)}, the limit is "
                      f"{format_bytes(child.limit)} (resource requirements \"{name}\")\n")
        child.verdict = "oom"
        child.kill_at = time.monotonic() + 5
        self._signal(child, signal.SIGKILL)

    def _launch(self):
        """Start the queued jobs that fit."""
        if not self.queue or time.monotonic() < self.retry_at:
            return
        with self.lock:
            ready, kept = [], []
            while self.queue and not self.draining:
                job, claimed = self.queue.popleft()
                places = self.room.place(self.need(job))
                if places is not None:
                    ready.append((job, places))
                    self.ending[self._key(job)] = job      # held until it is a child
                else:
                    kept.append((job, claimed))
                    if job.get("prefetched"):
                        break             # those behind it need as much
            self.queue.extendleft(reversed(kept))
        for job, places in ready:
            self._spawn(job, places)
        if self.fault and not self.children:
            self._drain()

    @staticmethod
    def _key(job):
        return job["id"], job["run_id"], job["attempt_id"]

    def need(self, job):
        """The Need of a job."""
        return self.needs[job["resource_requirements_id"]]["need"]

    def _spawn(self, job, places):
        """Start a job's process; a failure to start it is a failure of the job."""
        stdio = {**self.limits.stdio, **json.loads(job.get("stdio") or "{}")}
        need = self.need(job)
        gpus = [self.free_gpus.pop(0) for _ in range(min(need.gpus, len(self.free_gpus)))]
        child = Child(job, need, places, stdio, gpus)
        self.last_kind = job["resource_requirements_id"]
        child.files = Stdio(self.directory, self.workflow_id, child.key, stdio["mode"])
        record = self.needs[job["resource_requirements_id"]]
        if self.limits.limit_resources and self.limits.monitor and record["name"] != "default":
            child.limit = need.memory
        self.journal.add({"start": list(child.key)})
        self.journal.flush()
        child.started = time.monotonic()
        try:
            child.pid = self._exec(child)
        except (OSError, ValueError) as error:
            self._failed_to_start(child, error)
            return
        self.fault = None
        self.journal.add({"pid": [child.pid, round(time.clock_gettime(time.CLOCK_BOOTTIME), 2)]})
        with self.lock:
            self.children[child.pid] = child
            self.ending.pop(child.key, None)
            self.starts.append({"job_id": job["id"], "attempt_id": job["attempt_id"]})
            if len(self.starts) == 1:
                self.talk.notify()        # so that it is told soon, if the job lasts

    def _failed_to_start(self, child, error):
        """The process could not be made: return code 126, and the reason in the tail.

        If this machine is at fault, the job waits for better times; nothing runs: give up.
        """
        reason = getattr(error, "strerror", None) or str(error)
        reason += f": {error.filename}" if getattr(error, "filename", None) else ""
        self.free_gpus += child.gpus
        self.room.leave(child.need, child.places)
        if getattr(error, "errno", None) not in MACHINE_FAULTS:
            self._completed(child, 126, 0.0, None,
                            f"torc: the job could not be started: {reason}\n")
            return
        self.journal.add({"ok": [list(child.key)]})     # it has not been started
        with self.lock:
            self.ending.pop(child.key, None)
            self.queue.appendleft((child.job, time.monotonic()))
        if not self.fault:
            self.say(f"job {child.job['id']} cannot be started here now: {reason}")
        self.fault, self.retry_at = reason, time.monotonic() + 5

    def _exec(self, child):
        """posix_spawn of a job in a session of its own; returns the pid. Raises OSError."""
        import signal
        job = child.job
        environment = {**self.base_environment, **self.client.job_environment(),
                       "TORC_JOB_ID": str(job["id"]), "TORC_JOB_NAME": job["name"],
                       "TORC_ATTEMPT_ID": str(job["attempt_id"]),
                       "TORC_RUN_ID": str(job["run_id"])}
        if child.gpus:
            environment.update(dict.fromkeys(GPU_VARIABLES, ",".join(child.gpus)))
        environment.update(self._job_values(child))
        child.environment = environment if job.get("failure_handler_id") else None
        command = job["command"]
        if job.get("invocation_script"):
            command = f"{job['invocation_script']} {command}"
        words = ["bash", "-c", command]
        if len(command.encode()) >= TOO_LONG:
            words = ["bash", self._script(child, command)]
        program, words = self._program(child, words)
        out, err = child.files.open(self.null)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, self.null, 0), (os.POSIX_SPAWN_DUP2, out, 1),
                       (os.POSIX_SPAWN_DUP2, err, 2)]
            keywords = {"file_actions": actions, "setsigmask": [],
                        "setsigdef": [signal.SIGPIPE, signal.SIGXFSZ]}
            try:
                return os.posix_spawn(program, words, environment, setsid=True, **keywords)
            except NotImplementedError:   # a Python built for an old glibc
                return os.posix_spawn(program, words, environment, setpgroup=0, **keywords)
        finally:
            for fd in {out, err} - {self.null}:
                os.close(fd)

    def _job_values(self, child):
        """What else a job gets in its environment."""
        return {}

    def _program(self, child, words):
        """(path of the program, its arguments) that run a job's `words`."""
        return self.bash, words

    def _script(self, child, command):
        """A command too long for an argument, as a script file; returns its path."""
        path = os.path.join(self.directory, "journal", "job_{}_{}_{}.sh".format(*child.key))
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o700), "w",
                  encoding="utf-8") as file:
            file.write(command)
        return path

    def _reap(self):
        """Take the exits of our own processes, never anybody else's."""
        for pid in list(self.children):
            with contextlib.suppress(ChildProcessError):
                done, status, usage = os.wait4(pid, os.WNOHANG)
                if done:
                    self._exited(self.children[pid], status, usage)
        if time.monotonic() >= self.bury_at:
            self.bury_at = time.monotonic() + 1
            self._bury()

    def _bury(self):
        """Reap dead orphans of jobs, which are our children now; nobody else waits for them."""
        with self.lock:
            own = {self.guardian, *self.children, *(process.pid for process in self.scripts)}
            for word in read_text(f"/proc/self/task/{os.getpid()}/children").split():
                if int(word) not in own:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(int(word), os.WNOHANG)

    def _exited(self, child, status, usage):
        """A job's process has ended."""
        import signal
        elapsed = time.monotonic() - child.started
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        if child.verdict:                 # nothing of a job that we end may stay behind
            self._signal(child, signal.SIGKILL)
        self.free_gpus += child.gpus
        self.ends.append(time.monotonic())
        self.retry_at = 0.0
        with self.lock:
            self.room.leave(child.need, child.places)
            del self.children[child.pid]
            self.ending[child.key] = child.job
        self._completed(child, code, elapsed, usage, "")

    # -- the end of a job

    def _completed(self, child, code, elapsed, usage, text):
        """Work out status and result of an ended attempt and hand it to the talker."""
        job, limits = child.job, self.limits
        status = "completed" if code == 0 else "failed"
        files = []
        if child.verdict == "oom":
            status, code = "failed", limits.oom_exit_code
        elif child.verdict == "timeout" and code != 0:
            status, code = "terminated", limits.timeout_exit_code
        elif child.verdict in ("stop", "interrupt"):
            status = child.status or "terminated"
        elif code == 0 and job.get("output_files"):
            files, missing = self._outputs(job)
            if missing:
                return self._look_again(child, missing, elapsed, usage)
        return self._report(child, status, code, elapsed, usage, text + child.note, files)

    def _outputs(self, job):
        """([{id, st_mtime}], [missing paths]) of a job's output files."""
        present, missing = [], []
        for file in job["output_files"]:
            try:
                present.append({"id": file["id"], "st_mtime": os.stat(file["path"]).st_mtime})
            except OSError:
                missing.append(file["path"])
        return present, missing

    def _look_again(self, child, missing, elapsed, usage):
        """Outputs are missing: on a network file system they may appear within a minute."""
        folders = {os.path.dirname(os.path.abspath(path)) for path in missing}
        slow = any(NETWORK_FILE_SYSTEMS.search(file_system(folder)) for folder in folders
                   if os.path.isdir(folder))

        def look():
            deadline = time.monotonic() + (60 if slow else 0)
            pause = 0.1
            while True:
                for folder in folders:    # listing makes the client ask its server again
                    with contextlib.suppress(OSError):
                        os.listdir(folder)
                files, still = self._outputs(child.job)
                if not still or time.monotonic() >= deadline:
                    break
                time.sleep(pause)         # no event tells of a file on another host
                pause = min(2 * pause, 5)
            text = "".join(f"torc: output file missing: {path}\n" for path in still)
            self._report(child, "failed" if still else "completed", 1 if still else 0, elapsed,
                         usage, text, files)

        if slow:
            self._ask()                   # there is room for another job meanwhile
            threading.Thread(target=look, daemon=True).start()
        else:
            look()

    def _report(self, child, status, code, elapsed, usage, text, files):
        """Make the completion; a failure goes through its failure handler first."""
        job = child.job
        done = {"job_id": job["id"], "run_id": job["run_id"], "attempt_id": job["attempt_id"],
                "status": status, "return_code": code, "exec_time_minutes": elapsed / 60,
                "completion_time": iso_time(time.time())}
        if self.limits.monitor:
            done.update(self._usage(child, elapsed, usage))
        if files:
            done["output_files"] = files
        path = child.files.error_path()
        if text and path:
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
                file.write(text)
        if status not in ("completed", "canceled"):
            tail = (tail_of(path) if path else "") or text
            if tail:
                done["stderr_tail"] = tail
        if status == "completed" and child.stdio["delete_on_success"]:
            child.files.delete()
        if child.verdict == "interrupt":
            done["requeue"] = True
        rule = self._rule(job, code) if status == "failed" and not self.interrupted else None
        if rule and rule.get("recovery_script"):
            self._ask()
            threading.Thread(target=self._recover, args=(child, done, rule), daemon=True).start()
            return
        if rule:
            done["requeue"] = True
        self._hand_in(child, done)

    def _rule(self, job, code):
        """The failure handler's rule for a return code, if there are attempts left."""
        rules = self.handlers.get(job.get("failure_handler_id"), ())
        match = next((rule for rule in rules if code in (rule.get("exit_codes") or ())), None)
        match = match or next((rule for rule in rules if rule.get("match_all_exit_codes")), None)
        return match if match and job["attempt_id"] < match.get("max_retries", 3) else None

    def _recover(self, child, done, rule):
        """Run a recovery script; only if it succeeds is the job ready again (a thread)."""
        path = child.files.error_path() or os.devnull
        try:
            code = self._run_script(rule["recovery_script"], path, {
                **child.environment, "TORC_RETURN_CODE": str(done["return_code"])})
        except (OSError, ValueError) as error:
            code = str(error)
        if code == 0 or self.draining:    # cut short by our end: the next runner tries again
            done["requeue"] = True
        else:
            text = f"torc: the recovery script failed: return code {code}\n"
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
                file.write(text)
            done["stderr_tail"] = (done.get("stderr_tail", "") + text)[-STDERR_TAIL_BYTES:]
        self._hand_in(child, done)

    def _hand_in(self, child, done):
        """Journal a completion and give it to the talker."""
        job = child.job
        if (done["status"] == "failed" and not done.get("requeue")
                and self.workflow.get("use_pending_failed")
                and not self.handlers.get(job.get("failure_handler_id"))):
            done["status"] = "pending_failed"
        self.journal.add({"end": done})
        with self.talk:
            self.ending.pop(child.key, None)
            self.done.append(done)
            if len(self.done) == 1:
                self.done_since = time.monotonic()
            if len(self.done) == 1 or len(self.queue) < ENOUGH_AHEAD:
                self.talk.notify()
        if done["status"] in ("failed", "pending_failed", "terminated") and not self.interrupted:
            then = f" (torc logs {job['id']})"
            if done.get("requeue"):
                then = "" if self.gone else "; it will be tried again"
            last = done.get("stderr_tail", "").strip().rpartition("\n")[2]
            cause = last[6:] if last.startswith("torc: ") else f"return code {done['return_code']}"
            self.say(f"job {job['id']} \"{job['name']}\" {done['status'].replace('_', ' ')}: "
                     f"{cause}{then}")

    def _usage(self, child, elapsed, usage):
        """Peak and average memory and CPU of an attempt; what is not known is left out."""
        known = {}
        if usage and elapsed > 0:
            known["avg_cpu_percent"] = round(100 * (usage.ru_utime + usage.ru_stime) / elapsed, 1)
            # exec hands the spawner's own peak down, so no more than that says nothing.
            above = usage.ru_maxrss > self._own_peak() and usage.ru_maxrss > self._own_peak(0)
            peak = usage.ru_maxrss * 1024 if above else 0
            peak = max([peak, *child.memory])
            if peak:
                known["peak_memory_bytes"] = peak
        if child.memory:
            known["avg_memory_bytes"] = sum(child.memory) // len(child.memory)
        if child.cpu:
            known["peak_cpu_percent"] = round(max(child.cpu), 1)
        return known

    def _own_peak(self, age_s=1):
        """Peak resident memory of this process in KB, looked up if it is known for so long."""
        now = time.monotonic()
        if now >= getattr(self, "_peak_since", 0) + age_s:
            match = re.search(r"VmHWM:\s+(\d+)", read_text("/proc/self/status"))
            self._peak_kb = int(match[1]) + 256 if match else 2**40     # the kernel counts in lumps
            self._peak_since = now
        return self._peak_kb

    # -- the talking thread

    def _talker(self):
        """Send what has happened, take new jobs, decide when to leave."""
        try:
            self._converse()
        except NotFound as error:
            self.gone = True
            self._give_up(f"the workflow is gone: {error}")
        except TorcError as error:
            self._give_up(str(error))
        except Exception as error:        # a defect of ours must not leave the loop waiting
            import traceback
            self.progress.log.write(traceback.format_exc())
            self._give_up(f"unexpected error, see the runner's log: {error!r}")
        self.wake()

    def _give_up(self, reason):
        """End the jobs and leave with 1; the journal keeps what the server does not know."""
        import signal
        self.gave_up = not self.interrupted
        self.say(f"{reason}: ending {len(self.children)} running jobs")
        self._drain()
        self._end_scripts(signal.SIGTERM)
        for child in list(self.children.values()):
            self._end(child, "interrupt")
        self.wake()
        while self.children or self.ending or self.acting:
            with self.talk:
                self.talk.wait(0.2)
        if not self.gone:
            self.say(f"`torc run {self.workflow_id}` goes on from here once the cause is mended")
        self.code = 128 + self.interrupted if self.interrupted else 1

    def _converse(self):
        self.run_actions(self.client, ("on_workflow_start", "on_worker_start"))
        idle_since = None
        counted = 0.0
        while True:
            self._wait_for_cause(idle_since)
            now = time.monotonic()
            every = 5.0
            if self.progress.terminal:    # counting takes 10 ms for 100,000 jobs
                every = 0.2 if self.progress.counts.get("total", 0) < 10_000 else 1.0
            count = now - counted >= every or not counted
            answer = self._exchange(count)
            counted = now if count else counted
            if self.interrupted:
                if self._all_said():
                    return self._close(128 + self.interrupted)
                continue
            if self._busy():
                idle_since = None
                continue
            verdict = self._idle(answer, idle_since)
            if verdict is not None:
                return self._close(verdict)
            idle_since = idle_since or now

    def _busy(self):
        """Whether anything is held or to be said."""
        with self.lock:
            return bool(self.queue or self.children or self.ending or self.done or self.returns
                        or self.news or self.acting)

    def _all_said(self):
        with self.lock:
            return not (self.queue or self.children or self.ending or self.done or self.returns
                        or self.acting)

    def _wait_for_cause(self, idle_since):
        """Sleep until there is something to tell or to ask, or the heartbeat is due."""
        lease = self.situation.get("lease_s", 120.0)
        deadline = time.monotonic() + min(30.0, lease / 4)
        with self.talk:
            while not (self.returns or self.news):
                now = time.monotonic()
                due = deadline
                if self.done:             # together with the next ones while there is work here
                    if len(self.queue) < ENOUGH_AHEAD or self.interrupted:
                        break
                    due = min(due, self.done_since + GATHER_S)
                if self.interrupted and not (self.children or self.ending or self.queue):
                    return
                if self.starts:           # tell about long jobs soon, about short ones never
                    due = min(due, now + 0.2)
                for job, claimed in self.queue:
                    if job.get("prefetched"):
                        due = min(due, claimed + GIVE_BACK_S)
                if idle_since is not None:
                    due = min(due, idle_since + self._patience_s(), now + 5.0)
                if due <= now or not self.talk.wait(due - now):
                    break
            now = time.monotonic()
            late = [entry for entry in self.queue
                    if entry[0].get("prefetched") and now - entry[1] >= GIVE_BACK_S]
            for entry in late:
                self.queue.remove(entry)
                self.returns.append(entry[0])
            if late:
                self.ends.clear()         # the rate that they were claimed at is no longer true

    def _patience_s(self):
        """How long to wait for new jobs when others may make some."""
        return self.workflow["compute_node_wait_for_new_jobs_seconds"]

    def _exchange(self, count):
        """One step of the conversation, repeated until it is answered."""
        with self.lock:
            done, starts = list(self.done), list(self.starts)
            returns = [{"job_id": job["id"], "attempt_id": job["attempt_id"]}
                       for job in self.returns]
            ended = {(item["job_id"], item["attempt_id"]) for item in done}
            held = [[job["id"], job["attempt_id"]] for job in self._held()]
            claim = None if self.draining else self._claim()
            self.news = False
        self.step += 1
        body = {"compute_node_id": self.node_id, "step": self.step, "completions": done,
                "starts": [start for start in starts
                           if (start["job_id"], start["attempt_id"]) not in ended],
                "returns": returns, "held": held, "claim": claim, "counts": count}
        answer = self._send(body)
        self._take(answer, done, starts, returns, claim)
        return answer

    def _held(self):
        """Jobs that are here and not reported yet."""
        yield from (job for job, _ in self.queue)
        yield from (child.job for child in self.children.values())
        yield from self.ending.values()

    def _claim(self):
        """What this runner could take now, None for nothing."""
        room = self.room.copy()
        waiting = sum(room.place(self.need(job)) is None for job, _ in self.queue)
        prefetch = self._prefetch()
        claim = {**self._claim_values(), **({"prefetch": prefetch} if prefetch else {})}
        if room.most:
            claim["limit"] = room.most - room.number - waiting
        elif waiting:                     # what is free now is meant for those
            claim["limit"] = 0
        else:
            claim.update(limit=sum(free[0] for free in room.free), whole=list(room.whole),
                         bins=[list(free) for free in room.free])
        if self.end_time:
            claim["time_left_s"] = self._time_left()
        if claim["limit"] <= 0 and not claim.get("prefetch"):
            return None
        claim["limit"] = max(claim["limit"], 0)
        return claim

    def _claim_values(self):
        """What else a claim says."""
        return {}

    def _time_left(self):
        """Seconds for which new jobs may ask: what is left, and as upstream two minutes' grace."""
        return max(0.0, self.end_time - time.monotonic()) + RUNTIME_GRACE_S

    def _prefetch(self):
        """As many jobs of the requirement at work here as will end within 100 ms, at most 16."""
        now = time.monotonic()
        kinds = {job["resource_requirements_id"] for job in self._held()}
        if not kinds and self.ends and now - self.ends[-1] < PREFETCH_S:
            kinds = {self.last_kind}      # the last one ended just now
        if len(kinds) != 1 or len(self.ends) < 4:
            return None
        rate = (len(self.ends) - 1) / max(now - self.ends[0], 1e-6)
        ahead = sum(1 for job, _ in self.queue if job.get("prefetched"))
        number = min(PREFETCH_LIMIT, int(rate * PREFETCH_S)) - ahead
        return {"resource_requirements_id": kinds.pop(), "limit": number} if number > 0 else None

    def _send(self, body):
        """POST a step, which may be repeated until it is answered."""
        answer = self._patiently(lambda: self.client.post(
            f"/workflows/{self.workflow_id}/runner_step", body))
        self.lease_at = time.monotonic()
        return answer

    def _patiently(self, ask):
        """What `ask` returns; while the server is away or in trouble, the jobs go on."""
        import random
        pause, away = 0.2, None
        while True:
            try:
                answer = ask()
                if away:
                    self.say("the server is back after "
                             + format_duration(time.monotonic() - away))
                return answer
            except (Unreachable, Internal) as error:
                if not away:
                    away = time.monotonic()
                    self.say(f"{error}; the jobs go on, their results are kept until it is back")
                self._check_lease(time.monotonic())
                leaving = self._is_leaving()
                with self.talk:           # a completion is no reason to ask sooner, a signal is
                    self.talk.wait_for(lambda: not leaving and self._is_leaving(),
                                       0.2 if leaving else pause)
                pause = min(10.0, pause * random.uniform(1.5, 2))

    def _is_leaving(self):
        """Whether a signal came and all jobs have ended."""
        return self.interrupted and not self.children

    def _check_lease(self, now):
        """Raise Unreachable when the server would take us for dead soon, or a signal came."""
        lease = self.situation.get("lease_s", 20 * 60 + LEASE_MARGIN_S)
        if now - self.lease_at > lease - LEASE_MARGIN_S:
            away = format_duration(now - self.lease_at)
            raise Unreachable(f"the server has been away for {away}, as long as the workflow "
                              "allows")
        if self.tired:
            raise Unreachable("the server is away, the results wait in the journal")

    def _take(self, answer, done, starts, returns, claim):
        """Take over what an answer brings."""
        now = time.monotonic()
        with self.lock:
            self.done = self.done[len(done):]
            self.done_since = now         # of those that came meanwhile
            self.starts = self.starts[len(starts):]
            self.returns = self.returns[len(returns):]
            for key, record in answer["requirements"].items():
                self.needs[int(key)] = {**record, "need": read_need(record)}
            if self.draining:
                self.returns += answer["jobs"]
            else:
                self.queue.extend((job, now) for job in answer["jobs"])
            asked = (claim or {}).get("limit", 0)
            got = sum(1 for job in answer["jobs"] if not job.get("prefetched"))
            if asked and got >= asked and answer["has_ready"]:
                self.news = True          # there may be more that fits
            self.situation = answer
            self.run_id = answer["run_id"]
            held = {(child.job["id"], child.job["attempt_id"]): child
                    for child in self.children.values()}
        if done:
            self.journal.add({"ok": [[item["job_id"], item["run_id"], item["attempt_id"]]
                                       for item in done]})
        for stop in answer["stop"]:
            self._stop(stop, held)
        if answer.get("counts"):
            self.progress.update(answer["counts"])
        if answer["pending_actions"]:
            self._start_actions()
        self.wake()

    def _stop(self, stop, held):
        """The server wants a job ended (or has given it to somebody else)."""
        key = stop["job_id"], stop["attempt_id"]
        status = stop["status"] if stop["status"] in ("canceled", "terminated") else "canceled"
        child = held.get(key)
        if child:
            self._end(child, "stop", status)
            return
        with self.lock:                   # claimed, not started: simply forgotten
            for entry in list(self.queue):
                if (entry[0]["id"], entry[0]["attempt_id"]) == key:
                    self.queue.remove(entry)

    def _listener(self):
        """Keep one question open: has anything changed? (a thread)"""
        client = self.waiting
        since, failures = 0, 0
        while not self.ended.is_set():
            try:
                answer = client.get(f"/workflows/{self.workflow_id}/changes", since=since,
                                    wait_s=25)
                failures = 0
            except TorcError:
                failures += 1
                if failures == 1:
                    self._ask()           # the talker finds out what is wrong
                self.ended.wait(min(10.0, 0.2 * 2**min(failures, 6)))
                continue
            if answer["generation"] != since:
                since = answer["generation"]
                self._ask()
            self.ended.wait(answer.get("retry_after_s", 0))
        client.close()

    def _ask(self):
        """Make the talker send a step now."""
        with self.talk:
            self.news = True
            self.talk.notify()

    # -- what to do when there is nothing to do

    def _idle(self, answer, idle_since):
        """Exit code when it is time to leave, None to wait for news."""
        if answer["is_complete"] and not self.workflow.get(
                "compute_node_ignore_workflow_completion"):
            self.run_actions(self.client, ("on_workflow_complete",))
            return self._verdict()
        if self.fault:
            self.say(f"jobs cannot be started on this machine: {self.fault}; `torc run "
                     f"{self.workflow_id}` goes on from here once that is mended")
            return 1
        if self.draining:
            return self._time_is_up()
        report = self._ask_for("unfinished")
        others = [node for node in report["active_nodes"] if node["id"] != self.node_id]
        if others and any(is_dead_here(node) for node in others):
            for sentence in self._patiently(lambda: release_dead_nodes(
                    self.client, self.workflow_id, self.directory)):
                self.say(sentence)
            self.news = True
            return None
        fitting = [entry for entry in report["ready"]
                   if entry["count"] > entry["stopping"] and self._could_run(entry)]
        if fitting:
            self.news = True              # it became ready just now
            return None
        stopping = any(entry["stopping"] for entry in report["ready"])
        waited = idle_since is not None and time.monotonic() - idle_since >= self._patience_s()
        ignoring = answer["is_complete"] and not answer["is_canceled"]
        if (others or self._coming(report) or stopping or ignoring) and not waited:
            return None
        if ignoring:
            return self._verdict()
        self.say(self._why_stuck(report, others))
        return 3

    def _coming(self, report):
        """How many allocations may bring other runners."""
        return report["scheduled"]

    def _ask_for(self, what):
        """GET something of the workflow, however long it takes."""
        return self._patiently(lambda: self.client.get(f"/workflows/{self.workflow_id}/{what}"))

    def _could_run(self, entry):
        """Whether a ready job would fit on this machine when nothing else runs."""
        record = entry["resource_requirements"]
        if self.end_time and parse_duration(record["runtime"]) > self._time_left():
            return False
        if self.options.max_parallel_jobs:
            return True
        return not misfits(record, self.cpus, self.memory, len(self.gpus), len(self.room.free))

    def _why_stuck(self, report, others):
        """Which jobs are unfinished and why nobody here can run them."""
        parts = []
        for entry in report["ready"][:3]:
            need = entry["resource_requirements"]
            lacks = misfits(need, self.cpus, self.memory, len(self.gpus), len(self.room.free))
            if self.end_time and parse_duration(need["runtime"]) > self._time_left():
                left = format_duration(max(0, self.end_time - time.monotonic()))
                lacks.append(f"{need['runtime']} (there are {left} left)")
            verb = "needs" if entry["count"] == 1 else "need"
            parts.append(f"{plural(entry['count'], 'ready job')} (such as \"{entry['job_name']}\") "
                         f"{verb} " + " and ".join(lacks).replace("it has", "this runner has"))
        for entry in report["waiting"][:3]:
            parts.append(f"\"{entry['job_name']}\" (job {entry['job_id']}) is {entry['status']}"
                         + (f" and {entry['dependents']} jobs wait for it" if entry["dependents"]
                            else ""))
        if "uninitialized" in report["by_status"]:
            parts.append(f"`torc workflows reinit {self.workflow_id}` starts what is new")
        if others:
            parts.append(f"{len(others)} other runners have made nothing ready for "
                         f"{self._patience_s()} s")
        number = sum(report["by_status"].values())
        return (f"stopping with {plural(number, 'job')} unfinished: "
                + "; ".join(parts or ["nothing is ready"]))

    def _time_is_up(self):
        counts_now = self._ask_for("counts")
        if counts_now["is_complete"]:
            return self._verdict()
        self.progress.update(counts_now)
        self.say(f"stopping at the time limit: {self.progress.summary()}")
        return 3

    def _verdict(self):
        """0 or 1 by how the jobs of a complete workflow ended."""
        now = self._ask_for("counts")
        self.progress.update(now)
        bad = sum(now[name] for name in ("failed", "canceled", "terminated", "pending_failed"))
        return 1 if bad or now["is_canceled"] else 0

    def _close(self, code):
        """Last words to the server: the node is done."""
        self.run_actions(self.client, ("on_worker_complete",))
        self.step += 1
        answer = self._send({"compute_node_id": self.node_id, "step": self.step, "held": [],
                             "claim": None, "counts": True, "closing": True})
        self.progress.update(answer["counts"])
        self.progress.finish()
        elapsed = format_duration(time.monotonic() - self.progress.began)
        how = {0: "completed", 1: "ended with failures", 3: "is not finished"}.get(
            code, "was interrupted")
        self.say(f"workflow {self.workflow_id} {how} after {elapsed}: {self.progress.summary()}")
        if code >= 128:
            self.say(f"`torc run {self.workflow_id}` goes on from here")
        self.code = code

    # -- actions

    def _start_actions(self):
        """Run triggered actions beside the jobs, one thread at a time."""
        generation = self.situation["generation"]
        if self.acting or self.draining or self.looked_at == generation:
            return
        self.looked_at = generation       # those that are left are not for this runner
        if not self._runnable(self.client, JOB_TRIGGERS):
            return
        self.acting = True
        threading.Thread(target=self._run_in_thread, daemon=True).start()

    def _run_in_thread(self):
        client = self.client.clone()
        try:
            self.run_actions(client, JOB_TRIGGERS)
        except TorcError as error:
            self.say(f"actions: {error}")
        finally:
            client.close()
            self.acting = False
            self._ask()                   # the workflow may be complete, or have made more

    def _runnable(self, client, triggers):
        """Pending actions of these triggers that this runner can carry out; others are mentioned
        once. Allocations at the start of a workflow are for `torc submit`."""
        pending = self._patiently(lambda: client.get(
            f"/workflows/{self.workflow_id}/actions/pending", trigger_type=list(triggers)))
        runnable = []
        for action in pending:
            if action["action_type"] == "run_commands" or (
                    self.options.schedule and action["trigger_type"] != "on_workflow_start"):
                if action["id"] not in self.tried_actions or (
                        action["action_type"] == "run_commands" and not action["persistent"]):
                    runnable.append(action)
            elif not self.said_action:
                self.said_action = True
                self.say(f"action {action['id']} asks for allocations: `torc submit "
                         f"{self.workflow_id}` on a host of the cluster gets them")
        return runnable

    def run_actions(self, client, triggers):
        """Claim and carry out the actions that these triggers have made pending."""
        for action in self._runnable(client, triggers):
            if self.draining and triggers == JOB_TRIGGERS:
                return                    # left for the next runner
            self.tried_actions.add(action["id"])
            if not self._claim_action(client, action["id"]):
                continue
            if action["action_type"] == "run_commands":
                self._run_commands(action)
            else:
                self._schedule_nodes(client, action)

    def _schedule_nodes(self, client, action):
        """Submit the allocations of an action; if that fails it is left for somebody else."""
        try:
            self.say(self.options.schedule(client, action))
        except TorcError as error:
            self.say(f"action {action['id']}: {error}")
            with contextlib.suppress(TorcError):
                client.delete(f"/workflows/{self.workflow_id}/actions/{action['id']}/claim")

    def _claim_action(self, client, action_id):
        """Make an action ours; False if another runner has it."""
        actions = f"/workflows/{self.workflow_id}/actions"
        try:
            self._patiently(lambda: client.post(f"{actions}/{action_id}/claim",
                                                {"compute_node_id": self.node_id}))
            return True
        except Conflict:                  # or it is ours, and the answer that said so was lost
            return any(action["id"] == action_id and action["executed_by"] == self.node_id
                       for action in self._patiently(lambda: client.get(actions)))

    def _run_commands(self, action):
        """The commands of an action one after another; the first failure ends it."""
        log = os.path.join(self.directory, f"action_{action['id']}.log")
        last = action["trigger_type"] in ("on_worker_complete", "on_workflow_complete")
        for command in action["action_config"]["commands"]:
            try:
                environment = {**self.base_environment, **self.client.job_environment()}
                code = self._run_script(command, log, environment, last, self.directory)
                how = f"return code {code}" if code else "the runner was about to end"
            except (OSError, ValueError) as error:
                code, how = None, str(error)
            if code != 0:
                self.say(f"action {action['id']} ({action['trigger_type']}): `{command}` failed: "
                         f"{how}, see {log}")
                return


# ==================================================================================================
# 11 Slurm
# ==================================================================================================
# What is known of Slurm: its programs and what they print, the batch script of an allocation, the
# worker inside it, partitions of clusters. The programs are those of Slurm 20.11 and newer.

SLURM_TIMEOUT_S = 60                      # for one call of a Slurm program
QUEUE_EVERY_S = 60.0                      # how often squeue is asked by those who watch
WORKER_PATIENCE_S = 600.0                 # for which a worker looks for its server
TIME_LIMIT_SLACK_S = 75.0                 # by which Slurm's warning may come early, and more
DEATH_NOTICE_S = 3.0                      # from the jobs' end to ours when an allocation is ended
CONTROLLER_AWAY = re.compile(r"Unable to contact slurm controller|Socket timed out|Connection "
                             r"refused|Zero Bytes were transmitted|Transport endpoint", re.I)


# ---- programs

def run_program(words, timeout=SLURM_TIMEOUT_S, env=None):
    """(exit code, stdout, stderr) of a program. Raises TorcError: not on the PATH, hangs."""
    import subprocess
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace", timeout=timeout, env=env)
    except FileNotFoundError:
        raise TorcError(f"there is no {words[0]} on the PATH: is this a host of a Slurm cluster, "
                        "and is its module loaded?") from None
    except subprocess.TimeoutExpired:
        raise TorcError(f"{words[0]} has not answered within {timeout} s: is Slurm's controller "
                        "well?") from None
    except OSError as error:
        raise TorcError(f"{words[0]} cannot be started: {error.strerror}") from None
    return done.returncode, done.stdout, done.stderr


def slurm(*words, env=None, again=3):
    """Output of a Slurm program. Raises TorcError with its own words, or for what run_program does.

    again: how often it is tried again while the controller cannot be reached at all.
    """
    words = [str(word) for word in words]
    for pause in (*range(2, 2 + 4 * again, 4), None):
        code, out, err = run_program(words, env=env)
        away = CONTROLLER_AWAY.search(err)
        # A request that timed out may have been carried out, so sbatch is not repeated then.
        if code == 0 or not away or pause is None or (
                words[0] == "sbatch" and "timed out" in err):
            break
        time.sleep(pause)
    if code != 0:
        said = " ".join(line.strip() for line in err.splitlines() if line.strip())
        raise TorcError(f"{words[0]}: {said or f'exit code {code}'}")
    return out


# ---- what the queue says

QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD",
          "SPECIAL_EXIT"}
LIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


class Queued(NamedTuple):
    """What Slurm says of an allocation."""

    state: str                            # as squeue(1) and sacct(1) name it
    time_left_s: float | None = None      # of its walltime
    where: str = ""                       # its nodes, or in brackets why it waits

    @property
    def phase(self):
        """pending, active or over."""
        return "pending" if self.state in QUEUED else "active" if self.state in LIVE else "over"


def time_left(text):
    """Seconds of squeue's time left (%L): 4:05, 1-02:00:00; None for UNLIMITED and NOT_SET."""
    try:
        return float(parse_walltime(text.strip()))
    except ValueError:
        return None


def ask_queue(ids):
    """{id: Queued} of the allocations that squeue knows; those that ended long ago are absent.

    Raises TorcError if Slurm cannot be asked, which says nothing about the allocations.
    """
    if not ids:
        return {}
    try:
        out = slurm("squeue", "-h", "-t", "all", "-j", ",".join(map(str, sorted(ids))),
                    "-o", "%i|%T|%L|%R")
    except TorcError as error:
        if "Invalid job id" in str(error):           # it knows none of them
            return {}
        raise
    found = {}
    for line in out.splitlines():
        number, state, left, where = (line.split("|", 3) + ["", "", ""])[:4]
        if number.strip().isdigit():
            found[int(number)] = Queued(state.strip(), time_left(left), where.strip())
    return found


def ask_accounting(ids):
    """{id: Queued} of allocations by sacct; {} where there is no accounting."""
    if not ids:
        return {}
    try:
        out = slurm("sacct", "-X", "-n", "-P", "-j", ",".join(map(str, sorted(ids))),
                    "-o", "JobIDRaw,State,NodeList", again=0)
    except TorcError:
        return {}
    rows = (line.split("|", 2) for line in out.splitlines() if line.count("|") >= 2)
    return {int(number): Queued(state.split()[0] if state else "UNKNOWN", None, nodes)
            for number, state, nodes in rows if number.isdigit()}


class Watch:
    """What Slurm says of some allocations, asked for all of them together and once a minute."""

    def __init__(self):
        self._asked, self._ids, self._found = -math.inf, set(), {}

    def look(self, ids, now):
        """{id: Queued}; an allocation of which nothing is known any more is over. Raises TorcError.

        now: time.monotonic().
        """
        ids = set(ids)
        if now - self._asked >= QUEUE_EVERY_S or not ids <= self._ids:
            found = ask_queue(ids)
            found.update(ask_accounting(ids - set(found)))
            self._asked, self._ids, self._found = now, ids, found
        return {number: self._found.get(number, Queued("UNKNOWN")) for number in ids}


# ---- getting allocations

class WorkerRequest(NamedTuple):
    """How the workers of an allocation are to be started."""

    output_dir: str
    work_dir: str                         # where their commands run
    urls: tuple                           # at which they look for the server, the best first
    max_parallel_jobs: int | None = None
    one_worker_per_node: bool | None = None
    keep_script: bool = False
    prefix: str = ""                      # of the Slurm job's name


def own_command():
    """The words that start this program elsewhere on the same file systems."""
    path = os.path.abspath(__file__)
    loader = globals().get("__loader__")
    if not os.path.isfile(path) and hasattr(loader, "archive"):
        path = os.path.abspath(loader.archive)
    return [sys.executable, path]


def worker_urls(client, named=()):
    """URLs at which compute nodes are to look for the client's server, the best first.

    The client's own, unless it leads to this machine's loopback; then where the server says it can
    be reached. named: what the user says instead. Raises UsageError for a local database,
    Unreachable for a server that listens on loopback only.
    """
    if client.is_local:
        raise UsageError(
            f"compute nodes cannot work on the database file {client.where}: start a server for "
            f"it, `torc-server run --host 0.0.0.0 --database {client.where}`, and name that with "
            "--url or TORC_API_URL")
    if named:
        return tuple(make_url(*split_url(url)) for url in named)
    addresses = resolved(client.host)
    urls = [] if all(map(is_loopback, addresses)) else [client.where]
    with contextlib.suppress(NotFound):              # a server that has no such operation
        urls += client.get("/server_info")["urls"]
    if not urls:
        raise Unreachable(
            f"the server at {client.where} listens on this machine only, so workers on compute "
            f"nodes could not reach it: start it with `torc-server run --host 0.0.0.0 --port "
            f"{client.port}` (or --host NAME that compute nodes know), or name an address that "
            "leads to it with --worker-url URL")
    return tuple(dict.fromkeys(urls))


def sbatch_option(name, value):
    """An #SBATCH line; "" for an option that is switched off. Raises UsageError."""
    import shlex
    if value is None or value is False:
        return ""
    if any(letter in str(value) for letter in "\n\r\0"):
        raise UsageError(f"the Slurm option {name} has a line break in its value: {value!r}")
    return f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")


def extra_options(text):
    """The #SBATCH lines of a scheduler's `extra`, with or without #SBATCH before them."""
    lines = [re.sub(r"^\s*#SBATCH\s+", "", line).strip() for line in (text or "").splitlines()]
    return [f"#SBATCH {line}" for line in lines if line]


def exports_nothing(scheduler, defaults):
    """Whether the environment of the submitter is known not to reach the allocation."""
    words = re.findall(r"--export[= ](\S+)", scheduler.get("extra") or "")
    words += [str(value) for value in (defaults.get("export"), os.environ.get("SBATCH_EXPORT"))
              if value]
    return any("ALL" not in word.upper().split(",") for word in words)


SCRIPT_BODY = """
# Allocation of workflow {workflow_id}, written by torc {version}.
export SLURM_EXPORT_ENV=ALL{environment}
trouble() {{
    echo "torc: on $(hostname): $1" | tee -a {note} >&2
    exit 1
}}
[ -r {program} ] || trouble {unreadable}
{python} -c "" || trouble {unstartable}
exec {words}
"""


def allocation_script(workflow, scheduler, name, request, words, environment=()):
    """Text of the batch script of an allocation: sbatch(1).

    words: the worker's command line; environment: (name, value) pairs that are no secrets. The
    worker takes the shell's place, so that Slurm's signals reach it.
    """
    import shlex
    defaults = json.loads(workflow.get("slurm_defaults") or "{}")
    limits = read_limits(workflow)
    log = os.path.join(request.output_dir.replace("%", "%%"),
                       f"slurm_output_wf{workflow['id']}_sl%j")
    options = {"job-name": name, "output": f"{log}.o", "error": f"{log}.e", "open-mode": "append",
               "chdir": request.work_dir, "account": scheduler.get("account"),
               "time": scheduler["walltime"], "nodes": scheduler["nodes"],
               "ntasks-per-node": scheduler.get("ntasks_per_node")}
    options.update({key: scheduler.get(key) for key in ("partition", "qos", "mem", "gres", "tmp")})
    # A second warning beside the worker's own clock. Slurm may send it a minute early; and srun,
    # which stands before several workers, would end them at once.
    if not request.one_worker_per_node and parse_walltime(scheduler["walltime"]) >= 300:
        options["signal"] = f"B:TERM@{max(1, int(limits.sigkill_headroom_s))}"
    options.update({str(key).lstrip("-"): value for key, value in defaults.items()
                    if options.get(str(key).lstrip("-")) is None or key == "signal"})
    lines = [sbatch_option(key, value) for key, value in options.items()]
    python, program = words[0], words[1]
    if request.one_worker_per_node:
        number = scheduler["nodes"]       # the allocation may have more tasks
        words = ["srun", f"--nodes={number}", f"--ntasks={number}", "--ntasks-per-node=1",
                 "--overlap", "--cpu-bind=none", "--mem=0", "--kill-on-bad-exit=0", *words]
    note = os.path.join(request.output_dir, f"worker_wf{workflow['id']}_sl")
    body = SCRIPT_BODY.format(
        workflow_id=workflow["id"], version=VERSION, words=" ".join(map(shlex.quote, words)),
        environment="".join(f" {key}={shlex.quote(value)}" for key, value in environment),
        note=shlex.quote(note) + '"$SLURM_JOB_ID".note',
        program=shlex.quote(program), python=shlex.quote(python),
        unreadable=shlex.quote(f"{program} cannot be read there: put torc on a file system that "
                               "compute nodes see, and submit again"),
        unstartable=shlex.quote(f"{python} does not start there: take a Python that compute nodes "
                                "have, and submit again"))
    return "\n".join(["#!/bin/bash", *filter(None, lines), *extra_options(scheduler.get("extra"))]
                     ) + "\n" + body


def worker_words(client, workflow, scheduler, request, number):
    """The command line of an allocation's worker. number: of allocations asked for together."""
    words = [*own_command(), "slurm-job-runner", ",".join(request.urls), str(workflow["id"]),
             request.output_dir, "--server-id", client.server_id(),
             "--scheduler-config-id", str(scheduler["id"]), "--program-hash", own_hash()]
    if request.max_parallel_jobs:
        words += ["--max-parallel-jobs", str(request.max_parallel_jobs)]
    tls = client.tls or {}
    if tls.get("ca_cert"):
        words += ["--tls-ca-cert", os.path.abspath(tls["ca_cert"])]
    if tls.get("insecure"):
        words.append("--tls-insecure")
    if request.one_worker_per_node:
        words.append("--is-subtask")
    config = json.loads(workflow.get("execution_config") or "{}")
    runners = number * (scheduler["nodes"] if request.one_worker_per_node else 1)
    if config.get("staggered_start", True) and runners > 50:
        words += ["--startup-delay-seconds", str(min(60, runners // 50))]
    return words


def needs_whole_nodes(client, workflow_id):
    """Whether the workflow has jobs of several nodes."""
    wide = {record["id"] for record in client.items("/resource_requirements",
                                                    workflow_id=workflow_id)
            if record["num_nodes"] > 1}
    return bool(wide) and any(job["resource_requirements_id"] in wide for job in client.items(
        "/jobs", workflow_id=workflow_id))


def by_steps(workflow):
    """Whether the workflow wants its jobs as steps of srun."""
    config = json.loads(workflow.get("execution_config") or "{}")
    return config.get("mode") in ("slurm", "auto")


def submission_environment(client):
    """The environment for sbatch: the credentials, nothing of an allocation or job around us."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "TORC_")) or name == "SLURM_CONF"}
    known = client.job_environment()
    return {**kept, "TORC_USERNAME": client.user,
            **{name: known[name] for name in ("TORC_PASSWORD", "TORC_COOKIE_HEADER")
               if name in known}}


def submit_allocations(client, workflow, scheduler, number, request):
    """Ask Slurm for allocations of a scheduler's record; returns the ids of the Slurm jobs.

    Each is stored as a scheduled compute node. Raises TorcError; one that says how many were
    submitted before has them in .submitted.
    """
    import shlex
    if request.one_worker_per_node is None:
        request = request._replace(one_worker_per_node=(
            scheduler["nodes"] > 1 and not by_steps(workflow)
            and not needs_whole_nodes(client, workflow["id"])))
    os.makedirs(request.output_dir, mode=0o700, exist_ok=True)
    words = worker_words(client, workflow, scheduler, request, number)
    secrets = {"TORC_PASSWORD", "TORC_COOKIE_HEADER"} & set(client.job_environment())
    defaults = json.loads(workflow.get("slurm_defaults") or "{}")
    if secrets and exports_nothing(scheduler, defaults):
        words += ["--credentials", write_credentials(client, workflow["id"], request.output_dir)]
    made = []
    for index in range(1, number + 1):
        name = f"{request.prefix}wf{workflow['id']}_{os.getpid()}_{next(SCRIPT_NUMBERS)}"
        path = os.path.join(request.output_dir, f"{name}.sh")
        write_private(path, allocation_script(workflow, scheduler, name, request, words,
                                              [("TORC_USERNAME", client.user)]))
        try:
            out = slurm("sbatch", "--parsable", path, env=submission_environment(client))
            match = re.search(r"^(\d+)", out, re.M)
            if not match:
                raise TorcError(f"sbatch has printed no job id: {out.strip()!r:.200}")
        except TorcError as error:
            first = shlex.quote(path)
            error = TorcError(f"{error} (allocation {index} of {number}, scheduler "
                              f"\"{scheduler['name']}\"; sbatch --test-only {first} tries it)")
            error.submitted = made
            raise error from None
        made.append(int(match[1]))
        client.post("/scheduled_compute_nodes", {
            "workflow_id": workflow["id"], "scheduler_id": made[-1], "scheduler_type": "slurm",
            "scheduler_config_id": scheduler["id"], "status": "pending",
            "output_dir": request.output_dir, "work_dir": request.work_dir}, once=True)
        if not request.keep_script:
            with contextlib.suppress(OSError):
                os.unlink(path)
    return made


SCRIPT_NUMBERS = itertools.count(1)


def credentials_path(workflow_id, server_id, output_dir):
    """The file (0600) from which workers read the password where sites export no environment."""
    return os.path.join(output_dir, f".credentials_wf{workflow_id}_{server_id}.json")


def write_credentials(client, workflow_id, output_dir):
    """Write that file; returns its path."""
    path = credentials_path(workflow_id, client.server_id(), output_dir)
    write_private(path, compact({"password": client.password, "cookie": client.cookie}))
    return path


def schedule_action(client, workflow, action, request):
    """Carry out a schedule_nodes action that has been claimed; returns the Slurm jobs' ids."""
    config = action["action_config"]
    if config.get("scheduler_type", "slurm") != "slurm":
        raise UsageError(f"action {action['id']}: there are no allocations of "
                         f"{config['scheduler_type']!r} here")
    scheduler = client.get(f"/slurm_schedulers/{config['scheduler_id']}")
    return submit_allocations(client, workflow, scheduler, config.get("num_allocations", 1),
                              request._replace(
        max_parallel_jobs=config.get("max_parallel_jobs", request.max_parallel_jobs),
        one_worker_per_node=config.get("start_one_worker_per_node", request.one_worker_per_node)))


def schedule_pending(client, workflow_id, request, triggers=None):
    """Carry out the schedule_nodes actions that are pending; returns [(action, ids), ...].

    One whose allocations could not be had at all is pending again; the error is raised.
    """
    workflow = client.get(f"/workflows/{workflow_id}")
    path, done = f"/workflows/{workflow_id}/actions", []
    for action in client.get(f"{path}/pending", trigger_type=triggers):
        if action["action_type"] != "schedule_nodes":
            continue
        try:
            client.post(f"{path}/{action['id']}/claim", {})
        except Conflict:
            continue
        try:
            done.append((action, schedule_action(client, workflow, action, request)))
        except TorcError as error:
            if not getattr(error, "submitted", None):
                client.delete(f"{path}/{action['id']}/claim")
            raise
    return done


# ---- allocations that have ended

def fate(state, limits):
    """(status, return code) of the jobs that ran when an allocation ended in this state, or None:
    they are ready again."""
    if state in ("TIMEOUT", "DEADLINE"):
        return "terminated", limits.timeout_exit_code
    if state == "OUT_OF_MEMORY":
        return "failed", limits.oom_exit_code
    return None


def live_allocations(client, workflow_id):
    """(scheduled nodes that have not ended, {Slurm job: [active compute nodes in it]})."""
    scheduled = [record for status in ("pending", "active") for record in client.items(
        "/scheduled_compute_nodes", workflow_id=workflow_id, status=status)
        if record["scheduler_type"] == "slurm"]
    inside = {}
    for node in client.items("/compute_nodes", workflow_id=workflow_id, is_active=True):
        number = (node.get("scheduler") or {}).get("scheduler_id")
        if node["compute_node_type"] == "slurm" and isinstance(number, int):
            inside.setdefault(number, []).append(node)
    return scheduled, inside


def hand_in_journal(client, node, server_id):
    """Replay the journal of a runner that is known to be dead, whichever host it was on; returns
    the number of results."""
    number = 0
    for path in journals_in(node.get("output_dir") or DEFAULT_OUTPUT_DIR, server_id,
                            node["workflow_id"]):
        records = read_journal(path)
        header = records[0].get("header", {}) if records else {}
        if header.get("compute_node_id") == node["id"]:
            number += replay_journal(client, records)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    return number


def settle_allocations(client, workflow_id, watch=None, dry_run=False):
    """Put right what allocations that have ended left behind; returns what was done, in sentences.

    Results that their runners did not hand in are read from the journals. Jobs that ran are
    terminated if it was the time limit, failed if it was the memory limit, else ready again. An
    allocation of which Slurm cannot be asked is left alone: raises TorcError.
    """
    scheduled, inside = live_allocations(client, workflow_id)
    ids = {record["scheduler_id"] for record in scheduled} | set(inside)
    if not ids:
        return []
    queue = (watch or Watch()).look(ids, time.monotonic())
    limits = read_limits(client.get(f"/workflows/{workflow_id}"))
    said = []
    for number in sorted(ids):
        entry = queue[number]
        if entry.phase != "over":
            continue
        for node in inside.get(number, ()):
            said.append(f"allocation {number} ended ({entry.state}) with the runner on "
                        f"{node['hostname']} at work")
            if not dry_run:
                said[-1] += bury_node(client, node, entry.state, fate(entry.state, limits))
        for record in scheduled:
            if record["scheduler_id"] == number and not dry_run:
                gone = "canceled" if entry.state in ("CANCELLED", "REVOKED") else "complete"
                client.put(f"/scheduled_compute_nodes/{record['id']}",
                           {"status": gone, "note": entry.state})
        if number not in inside:
            said.append(f"allocation {number} has ended ({entry.state})")
    return said


def bury_node(client, node, state, ended):
    """Hand in and settle what a compute node's dead runner left; returns that in words."""
    number = hand_in_journal(client, node, client.server_id())
    query = {"reason": f"its allocation ended: {state}"}
    if ended:
        query.update(status=ended[0], return_code=ended[1])
    freed = client.post(f"/compute_nodes/{node['id']}/release", **query)
    parts = [f"{plural(number, 'result')} read from its journal"] if number else []
    if freed["requeued"]:
        parts.append(f"{plural(len(freed['requeued']), 'job')} ready again")
    if ended and freed["canceled"]:
        parts.append(f"{plural(freed['canceled'], 'job')} {ended[0]}")
    return ": " + ", ".join(parts) if parts else ""


# ---- the worker in an allocation

class Allocation(NamedTuple):
    """Where a worker is, by the variables that Slurm sets: sbatch(1), srun(1)."""

    job_id: int
    node_index: int                       # of this node in the allocation
    nodes: int
    cpus: int                             # of each node
    memory_bytes: int
    restarts: int                         # how often Slurm has started it anew


def cpus_per_node(text):
    """The least number in SLURM_JOB_CPUS_PER_NODE, such as "4(x2),8"; None if there is none."""
    numbers = [int(part) for part in re.findall(r"(?:^|,)(\d+)", text or "")]
    return min(numbers, default=None)


def read_allocation(environ):
    """The Allocation around this process. Raises UsageError outside of one."""
    job_id = environ.get("SLURM_JOB_ID", "")
    if not job_id.isdigit():
        raise UsageError("there is no SLURM_JOB_ID: this command is for inside of an allocation; "
                         "`torc submit` gets one, `torc run` needs none")

    def number(name, default=None):
        text = environ.get(name, "")
        return int(text) if text.isdigit() else default

    cpus = (cpus_per_node(environ.get("SLURM_JOB_CPUS_PER_NODE"))
            or number("SLURM_CPUS_ON_NODE") or usable_cpus())
    memory = usable_memory()
    given = number("SLURM_MEM_PER_NODE") or cpus * number("SLURM_MEM_PER_CPU", 0)
    return Allocation(int(job_id), number("SLURM_NODEID", 0), number("SLURM_JOB_NUM_NODES", 1),
                      cpus, min(memory, given * 2**20) if given else memory,
                      number("SLURM_RESTART_COUNT", 0))


def worker_note(output_dir, workflow_id, job_id):
    """Where a worker that cannot begin says why, for `status` and `why`."""
    return os.path.join(output_dir, f"worker_wf{workflow_id}_sl{job_id}.note")


def reach_server(urls, server_id, how, note, patience_s=WORKER_PATIENCE_S, say=print):
    """A Client of the server with this id (or any) at the first URL that leads to it.

    Waits while there is none, since it may be started again. note: path of a file that says what
    is wrong as long as something is. Raises Unreachable with a line for each URL.
    """
    import socket
    deadline, pause, told = time.monotonic() + patience_s, 1.0, None
    while True:
        places = list(dict.fromkeys([*urls, *noted_urls(server_id)]))
        probes = race(places, server_id, 10.0, how.get("tls"))
        if probes[-1].state == "ok":
            client = Client(probes[-1].url, **how)
            client.id, client.others = probes[-1].server_id, tuple(places)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(note)
            return client
        text = "\n".join([f"the worker on {socket.gethostname()} does not reach the server:",
                          *(f"  {found.url}: {found.text}" for found in probes)])
        if text != told:
            say(text)
            with contextlib.suppress(Unreachable):
                write_private(note, f"{iso_time(time.time())} {text}\n")
        told = text
        if time.monotonic() >= deadline:
            raise Unreachable(text)
        time.sleep(pause)                 # a server that comes back tells nobody
        pause = min(2 * pause, 15.0)


class SlurmRunner(Runner):
    """A runner inside an allocation: its resources and its end come from Slurm.

    On one node it starts jobs as any runner does. On several it starts them as steps of srun, but
    for jobs of several nodes, which run on the first one and start their own steps.
    """

    def __init__(self, client, workflow_id, options, allocation, config_id=None, strict=False,
                 alone=False):
        super().__init__(client, workflow_id, options)
        self.allocation, self.config_id, self.strict = allocation, config_id, strict
        self.alone = alone                # one of several runners in the allocation, each on a node
        self.steps = False
        self.hosts = [self.host]

    def labels(self):
        """See Runner.labels."""
        where = self.allocation
        return (f"slurm_wf{self.workflow_id}_sl{where.job_id}_n{where.node_index}_pid{os.getpid()}",
                f"wf{self.workflow_id}_sl{where.job_id}_n{where.node_index}_p{os.getpid()}")

    def _detect(self):
        where = self.allocation
        self.options = self.options._replace(
            num_cpus=self.options.num_cpus or where.cpus,
            memory_gb=self.options.memory_gb or where.memory_bytes / 2**30)
        super()._detect()
        number = 1 if self.alone else where.nodes
        self.steps = not self.alone and (number > 1 or by_steps(self.workflow))
        if self.steps:
            import shutil
            self.srun = shutil.which("srun")
            if not self.srun:
                raise TorcError("there is no srun on the PATH, which starts jobs in an allocation "
                                "of several nodes")
            names = slurm("scontrol", "show", "hostnames",
                          os.environ.get("SLURM_JOB_NODELIST", self.host)).split()
            self.hosts = names[:number]
            # Memory and CPUs of steps are Slurm's business, and what is measured here is srun.
            self.limits = self.limits._replace(monitor=False, limit_resources=False)
            self.accounts = Accounts(self)
            self.free_gpus = []           # srun gives each step its own
        self.room = Room(number, (self.cpus, self.memory, len(self.gpus)),
                         self.options.max_parallel_jobs)
        left = self._ask_time_left()
        if left is not None and self.end_time is None:
            self._end_in(left)

    def _ask_time_left(self):
        """Seconds until Slurm ends the allocation, None if it never does or does not say."""
        try:
            entry = ask_queue([self.allocation.job_id]).get(self.allocation.job_id)
        except TorcError as error:
            self.say(f"the end of this allocation is unknown: {error}")
            entry = None
        if entry and entry.time_left_s is not None:
            return entry.time_left_s
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        return float(end) - time.time() if end.isdigit() else None

    def _node_values(self):
        where = self.allocation
        return {"compute_node_type": "slurm", "scheduler_config_id": self.config_id, "scheduler": {
            "type": "slurm", "scheduler_id": where.job_id, "node_index": where.node_index,
            "restarts": where.restarts}}

    def _coming(self, report):
        return max(0, report["scheduled"] - 1)       # one of them is this one

    def _environment(self):
        super()._environment()
        for name in ("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU"):      # srun takes one of three
            self.base_environment.pop(name, None)

    def _claim_values(self):
        return {"scheduler_config_id": self.config_id, "strict_scheduler_match": self.strict}

    def _leave(self):
        self.ended.set()
        if self.steps:
            self.accounts.finish()
        super()._leave()

    # -- signals: Slurm sends SIGTERM before the time limit, and when the allocation is canceled

    def _handle_signals(self):
        import signal
        limits, now = self.limits, time.monotonic()
        lead = limits.sigkill_headroom_s + limits.sigterm_lead_s
        if signal.SIGTERM in self.received and not self.interrupted and self.end_time and (
                self.end_time - now < lead + TIME_LIMIT_SLACK_S):
            self.received.remove(signal.SIGTERM)
            self.end_time = min(self.end_time, now + lead)           # the time limit is now
        super()._handle_signals()

    def _completed(self, child, code, elapsed, usage, text):
        """Slurm signals the jobs of an allocation that ends as well as us: such a job was
        interrupted, it has not failed."""
        import signal
        ours = child.verdict or self.interrupted or self.draining
        if self.steps and not ours and child.step:
            self.accounts.add(child, code, elapsed, usage, text)
        elif code - 128 in (signal.SIGTERM, signal.SIGKILL) and not ours:
            threading.Thread(target=self._was_it_the_end, daemon=True,
                             args=(child, code, elapsed, usage, text)).start()
        else:
            if self.interrupted and not child.verdict and code != 0:
                child.verdict = "interrupt"
            super()._completed(child, code, elapsed, usage, text)

    def _was_it_the_end(self, child, code, elapsed, usage, text):
        """Report a job that a signal ended, once it is known if it was meant for all (a thread)."""
        deadline = time.monotonic() + DEATH_NOTICE_S
        with self.talk:
            while not self.interrupted and time.monotonic() < deadline:
                self.talk.wait(deadline - time.monotonic())
        if self.interrupted:
            child.verdict = "interrupt"
        super()._completed(child, code, elapsed, usage, text)

    # -- steps

    def _job_values(self, child):
        """A job of several nodes starts steps of its own, on its nodes and no others."""
        if child.need.nodes == 1 or not child.places:
            return {}
        names = ",".join(self.hosts[index] for index in child.places)
        values = {"TORC_NODELIST": names}
        if len(child.places) < len(self.hosts):
            number = str(len(child.places))
            values.update(SLURM_NNODES=number, SLURM_JOB_NUM_NODES=number, SLURM_NODELIST=names,
                          SLURM_JOB_NODELIST=names, SLURM_TASKS_PER_NODE=f"1(x{number})",
                          SLURM_NTASKS=number, SLURM_NPROCS=number)
        return values

    def _program(self, child, words):
        need = child.need
        if not self.steps or need.nodes > 1:
            return self.bash, words
        record = self.needs[child.job["resource_requirements_id"]]
        config = json.loads(self.workflow.get("execution_config") or "{}")
        child.step = "wf{}_j{}_r{}_a{}".format(self.workflow_id, *child.key)
        memory = "0" if record["name"] == "default" else f"{max(1, need.memory >> 20)}M"
        options = [f"--jobid={self.allocation.job_id}", "--nodes=1", "--ntasks=1", "--exact",
                   "--quiet", f"--job-name={child.step}", f"--cpus-per-task={need.cpus}",
                   f"--mem={memory}"]
        if child.places:
            options.append(f"--nodelist={self.hosts[child.places[0]]}")
        if need.gpus:
            options.append(f"--gpus={need.gpus}")
        if not config.get("enable_cpu_bind"):
            options.append("--cpu-bind=none")
        if self.end_time:
            left = self.end_time - time.monotonic() - self.limits.sigkill_headroom_s
            options.append(f"--time={max(1, math.ceil(left / 60))}")
        if config.get("srun_termination_signal"):
            options.append(f"--signal={config['srun_termination_signal']}")
        return self.srun, ["srun", *options, *words]

    def _signal(self, child, number):
        """srun ends its step at once when it is signalled itself, so Slurm is asked to signal."""
        if child.step and not has_exited(child.pid):
            threading.Thread(target=self._signal_step, args=(child, number), daemon=True).start()
        else:
            super()._signal(child, number)

    def _signal_step(self, child, number):
        try:
            steps = slurm("squeue", "-h", "-s", "-j", self.allocation.job_id, "-o", "%i|%j")
            ids = [line.split("|")[0] for line in steps.splitlines()
                   if line.endswith(f"|{child.step}")]
            for step in ids:
                slurm("scancel", f"--signal={int(number)}", step)
            if ids:
                return
        except TorcError as error:
            self.say(f"job {child.job['id']}: {error}")
        super()._signal(child, number)    # not begun yet, or Slurm is away


# ---- what Slurm's accounting says of steps

STEP_COLUMNS = ("JobName", "State", "ExitCode", "MaxRSS", "MaxVMSize", "MaxDiskRead",
                "MaxDiskWrite", "AveCPU", "NodeList", "Elapsed")


def accounting_bytes(text):
    """Bytes of a size that sacct prints: 12K, 3.5M, 0; None if there is none."""
    match = re.fullmatch(r"([\d.]+)([KMGTP]?)", text.strip())
    return int(float(match[1]) * 1024 ** " KMGTP".index(match[2] or " ")) if match else None


def accounting_seconds(text):
    """Seconds of a time that sacct prints: 00:01:02, 1-00:00:00, 00:00.120; None if none."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text.strip())
    if not match:
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return days * 86_400 + hours * 3600 + minutes * 60 + seconds


def step_figures(row):
    """Fields of slurm_stats from a row of STEP_COLUMNS; what is not known is left out."""
    known = {"max_rss_bytes": accounting_bytes(row["MaxRSS"]),
             "max_vm_size_bytes": accounting_bytes(row["MaxVMSize"]),
             "max_disk_read_bytes": accounting_bytes(row["MaxDiskRead"]),
             "max_disk_write_bytes": accounting_bytes(row["MaxDiskWrite"]),
             "ave_cpu_seconds": accounting_seconds(row["AveCPU"]),
             "node_list": row["NodeList"] or None}
    return {name: value for name, value in known.items() if value is not None}


class Accounts:
    """Asks sacct, for all steps that have ended meanwhile, what became of them and what they used,
    in a thread of its own; a failed job is reported when that is known."""

    PAUSES = (0.3, 1.0, 2.0, 4.0, 8.0)    # accounts are written a moment after the end

    def __init__(self, runner):
        import queue
        self.runner = runner
        self.ended = queue.Queue()
        self.thread = None
        self.off = False                  # there is no accounting here

    def add(self, child, code, elapsed, usage, text):
        """A step has ended; a success is reported at once, its figures follow."""
        if code == 0:
            Runner._completed(self.runner, child, code, elapsed, usage, text)
        if not self.thread:
            self.thread = threading.Thread(target=self._loop, daemon=True)
            self.thread.start()
        self.ended.put((child, code, elapsed, usage, text))

    def finish(self):
        """Wait for the figures of the last steps; the runner has ended."""
        if self.thread:
            self.thread.join(2 * sum(self.PAUSES))

    def _loop(self):
        """Until the runner has ended and nothing is open."""
        import queue
        waiting = []
        client = self.runner.client.clone()
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    waiting.append(self.ended.get(timeout=1.0))
                    while True:
                        waiting.append(self.ended.get_nowait())
                if not waiting:
                    if self.runner.ended.is_set():
                        return
                    continue
                for pause in self.PAUSES if not self.off else ():
                    time.sleep(pause)
                    rows = self._ask()
                    waiting = [entry for entry in waiting
                               if not self._settle(client, entry, rows.get(entry[0].step))]
                    if not waiting or self.off:
                        break
                for entry in waiting:     # nothing is known of these
                    self._report(entry, None)
                waiting = []
        finally:
            client.close()

    def _ask(self):
        """{step name: row} of the steps of this allocation that have ended."""
        try:
            out = slurm("sacct", "-n", "-P", "-j", self.runner.allocation.job_id, "-o",
                        ",".join(STEP_COLUMNS), again=0)
        except TorcError as error:
            self.runner.say(f"steps are not accounted for: {error}")
            self.off = True
            return {}
        rows = (dict(zip(STEP_COLUMNS, line.split("|"))) for line in out.splitlines())
        return {row["JobName"]: row for row in rows if len(row) == len(STEP_COLUMNS)
                and row["State"].split()[:1] not in ([], ["RUNNING"], ["PENDING"])}

    def _settle(self, client, entry, row):
        """Report a step if its row has come; says whether it had."""
        if row is None:
            return False
        child = entry[0]
        self._report(entry, row["State"].split()[0])
        job_id, run_id, attempt_id = child.key
        try:
            client.post("/slurm_stats", {
                "workflow_id": self.runner.workflow_id, "job_id": job_id, "run_id": run_id,
                "attempt_id": attempt_id, "slurm_job_id": str(self.runner.allocation.job_id),
                **step_figures(row)})
        except TorcError as error:
            self.runner.say(f"figures of job {job_id} are not kept: {error}")
        return True

    def _report(self, entry, state):
        """Hand in a step that did not succeed."""
        child, code, elapsed, usage, text = entry
        if code == 0:
            return
        runner = self.runner
        if state == "OUT_OF_MEMORY":
            child.verdict = "oom"
            child.note = "torc: killed: out of memory (Slurm's state is OUT_OF_MEMORY)\n"
        elif state in ("TIMEOUT", "DEADLINE"):
            child.verdict = "timeout"
        elif runner.interrupted:
            child.verdict = "interrupt"
        Runner._completed(runner, child, code, elapsed, usage, text)


# ---- HPC profiles

class Partition(NamedTuple):
    """Nodes of one kind in a partition of a cluster; None: no limit, or not known.

    A partition with nodes of several kinds has a Partition for each of them.
    """

    name: str
    cpus_per_node: int
    memory_mb: int | None
    max_walltime_secs: int | None
    max_nodes: int | None = None
    max_nodes_per_user: int | None = None
    min_nodes: int | None = None
    gpus_per_node: int | None = None
    gpu_type: str | None = None
    gpu_memory_gb: int | None = None
    local_disk_gb: int | None = None
    shared: bool = False                  # a job gets what it asks for, not the whole node
    requires_explicit_request: bool = False
    default_qos: str | None = None
    features: tuple = ()
    description: str | None = None


class Detection(NamedTuple):
    """A sign of being on a cluster: env (name = value), hostname (a regex), or file (a path)."""

    type: str
    value: str
    name: str | None = None               # of the environment variable


class Profile(NamedTuple):
    """What is known of a cluster."""

    name: str
    display_name: str
    description: str
    detection: tuple
    partitions: tuple
    default_account: str | None = None
    charge_factor_cpu: float | None = None
    charge_factor_gpu: float | None = None
    metadata: dict = {}


HOUR, DAY = 3600, 86_400
H100 = {"gpu_type": "h100", "gpu_memory_gb": 80, "shared": True}
ON_REQUEST = {"requires_explicit_request": True}

# Sources: nrel.github.io/HPC/Documentation/Systems/Kestrel/Running and Torc's profile of Kestrel.
# "shared" has to be named in a job, which our schedulers always do, so it is no special request.
KESTREL = Profile(
    "kestrel", "NLR Kestrel", "CPU and H100 nodes of the National Laboratory of the Rockies (NREL)",
    (Detection("env", "kestrel", "NREL_CLUSTER"),), (
        #         name       CPUs      MB       walltime  nodes  for a user
        Partition("debug",     104,   246_064,      HOUR,     2,    2, gpus_per_node=2,
                  **H100, **ON_REQUEST, features=("debug",)),
        Partition("short",     104,   246_064,  4 * HOUR, 2_240),
        Partition("standard",  104,   246_064,   2 * DAY, 2_240, 1_050),
        Partition("long",      104,   246_064,  10 * DAY,   430,  215),
        Partition("medmem",    104,   984_256,  10 * DAY,    64,   32, features=("highmem",)),
        Partition("bigmem",    104, 2_000_000,   2 * DAY,    10,    4, local_disk_gb=5_600,
                  features=("bigmem", "nvme")),
        Partition("bigmeml",   104, 2_000_000,  10 * DAY,     4,    2, local_disk_gb=5_600,
                  features=("bigmem", "nvme")),
        Partition("hbw",       104,   246_064,   2 * DAY,   512,  256, 2, **ON_REQUEST,
                  features=("dual-nic",)),
        Partition("hbwl",      104,   246_064,  10 * DAY,   128,   64, 2, **ON_REQUEST,
                  features=("dual-nic",)),
        Partition("nvme",      104,   246_064,   2 * DAY,   256,  128, local_disk_gb=1_700,
                  **ON_REQUEST, features=("nvme",)),
        Partition("shared",    104,   246_064,   2 * DAY,   128,   64, shared=True),
        Partition("sharedl",   104,   246_064,  10 * DAY,    32,   16, shared=True),
        Partition("gpu-h100s", 128,   360_000,  4 * HOUR,   156, None, gpus_per_node=4,
                  local_disk_gb=3_400, **H100, features=("gpu", "h100")),
        Partition("gpu-h100",  128,   360_000,   2 * DAY,   156, None, gpus_per_node=4,
                  local_disk_gb=3_400, **H100, features=("gpu", "h100")),
        Partition("gpu-h100l", 128,   360_000,  10 * DAY,    39, None, gpus_per_node=4,
                  local_disk_gb=3_400, **H100, features=("gpu", "h100")),
    ), charge_factor_cpu=10.0, charge_factor_gpu=100.0, metadata={
        "documentation": "https://nrel.github.io/HPC/Documentation/Systems/Kestrel/Running/"})

# Source: Torc's profile of Dane; how many nodes each partition has is not published.
DANE = Profile(
    "dane", "LLNL Dane", "CPU nodes of Lawrence Livermore National Laboratory",
    (Detection("env", "dane", "CLUSTER"),), (
        Partition("pdebug",   112, 257_054,    HOUR, **ON_REQUEST, features=("debug",)),
        Partition("pbatch",   112, 257_054,     DAY),
        Partition("pci",      112, 257_054,     DAY, **ON_REQUEST, features=("ci",)),
        Partition("pserial",  112, 257_054, 7 * DAY, **ON_REQUEST, features=("serial",)),
        Partition("pjupyter", 112, 257_054,     DAY, **ON_REQUEST, shared=True,
                  features=("jupyter",)),
        Partition("pall",     112, 257_054,    None, **ON_REQUEST, features=("special",)),
    ), charge_factor_cpu=1.0, metadata={
        "documentation": "https://hpc.llnl.gov/hardware/compute-platforms/dane"})

BUILT_IN_PROFILES = {profile.name: profile for profile in (KESTREL, DANE)}
DYNAMIC_PROFILE = "slurm"                 # read from the cluster's own programs
PROFILE_RULES = {                         # types as in SPEC_FIELDS
    "name": "name!", "display_name": "str", "description": "str", "detection": "list",
    "partitions": "list!", "default_account": "str", "charge_factor_cpu": "number",
    "charge_factor_gpu": "number", "metadata": "map"}
DETECTION_RULES = {"type": "enum!:env|hostname|file", "value": "name!", "name": "str"}
PARTITION_RULES = {
    "name": "name!", "cpus_per_node": "positive!", "memory_mb": "positive",
    "max_walltime_secs": "positive", "max_nodes": "positive", "max_nodes_per_user": "positive",
    "min_nodes": "count", "gpus_per_node": "count", "gpu_type": "str", "gpu_memory_gb": "positive",
    "local_disk_gb": "count", "shared": "bool", "requires_explicit_request": "bool",
    "default_qos": "str", "features": "strs", "description": "str"}


def profile_json(profile):
    """A profile as JSON values; read_profile reads it back."""
    return {**profile._asdict(),
            "detection": [sign._asdict() for sign in profile.detection],
            "partitions": [{**one._asdict(), "features": list(one.features)}
                           for one in profile.partitions]}


def checked_record(record, rules, what):
    """The fields of a record of a profile that are not null. Raises TorcError."""
    if not isinstance(record, dict):
        raise TorcError(f"{what} is {record!r:.60}, not a mapping")
    for name, value in record.items():
        if name not in rules:
            raise TorcError(f"{what}: unknown field {name!r}{nearest(name, rules)}")
        fault = fault_of(value, rules[name]) if value is not None else None
        if fault:
            raise TorcError(f"{what}: {name}: {fault}")
    for name, rule in rules.items():
        if "!" in rule.partition(":")[0] and record.get(name) is None:
            raise TorcError(f"{what}: the field {name} is missing")
    return {name: value for name, value in record.items() if value is not None}


def read_profile(path):
    """The Profile in a JSON file, as `torc hpc generate` writes it. Raises TorcError."""
    record = checked_record(parse_json(path, read_spec_text(path)), PROFILE_RULES, path)
    signs, partitions = [], []
    for number, one in enumerate(record.get("detection", ())):
        what = f"{path}: detection {number + 1}"
        sign = Detection(**checked_record(one, DETECTION_RULES, what))
        if sign.type == "env" and not sign.name:
            raise TorcError(f"{what}: the field name, of the environment variable, is missing")
        with contextlib.suppress(re.error):
            re.compile(sign.value if sign.type == "hostname" else "")
            signs.append(sign)
            continue
        raise TorcError(f"{what}: {sign.value!r} is no regular expression")
    for number, one in enumerate(record["partitions"]):
        good = checked_record(one, PARTITION_RULES, f"{path}: {title('partition', number, one)}")
        partitions.append(Partition(**{"memory_mb": None, "max_walltime_secs": None, **good,
                                       "features": tuple(good.get("features", ()))}))
    if record["name"] == DYNAMIC_PROFILE:
        raise TorcError(f'{path}: the name "{DYNAMIC_PROFILE}" is that of the profile that is read '
                        "from the cluster: take another")
    return Profile(**{"display_name": record["name"], "description": "", **record,
                      "detection": tuple(signs), "partitions": tuple(partitions)})


def known_profiles():
    """{name: Profile}: the user's own in ~/.torc/hpc first, then the built-in ones.

    Raises TorcError for a file that is wrong.
    """
    directory, own = os.path.expanduser("~/.torc/hpc"), {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in sorted(os.listdir(directory)):
            if name.endswith(".json"):
                profile = read_profile(os.path.join(directory, name))
                own[profile.name] = profile
    return {**own, **{name: profile for name, profile in BUILT_IN_PROFILES.items()
                      if name not in own}}


def is_here(sign, hostname):
    """Whether a sign of a cluster is found on this machine."""
    if sign.type == "env":
        return os.environ.get(sign.name) == sign.value
    if sign.type == "hostname":
        return bool(re.search(sign.value, hostname))
    return os.path.exists(os.path.expanduser(sign.value))


def detect_profile(profiles):
    """The first of {name: Profile} that has a sign here, or None."""
    import socket
    hostname = socket.gethostname()
    return next((profile for profile in profiles.values()
                 if any(is_here(sign, hostname) for sign in profile.detection)), None)


def find_profile(name=None):
    """The Profile of a name; without one the one detected here, else what this cluster says.

    Raises TorcError.
    """
    import shutil
    if name == DYNAMIC_PROFILE:
        return slurm_profile()
    profiles = known_profiles()
    if name:
        if name not in profiles:
            names = [*profiles, DYNAMIC_PROFILE]
            raise NotFound(f"no HPC profile {name!r}{nearest(name, names)}: there are "
                           f"{', '.join(names)}")
        return profiles[name]
    found = detect_profile(profiles)
    if found or shutil.which("sinfo"):
        return found or slurm_profile()
    raise TorcError("this machine is no HPC system that is known, and has no Slurm (no sinfo on "
                    f"the PATH): name a profile ({', '.join(profiles)})")


def number_in(text):
    """The whole number at the beginning of Slurm's output such as 4, 4000+, 1.5K; else None."""
    match = re.match(r"(\d+(?:\.\d+)?)([KM]?)", text or "")
    return int(float(match[1]) * {"": 1, "K": 1000, "M": 10**6}[match[2]]) if match else None


def gpus_in(gres):
    """(number, type) of the GPUs in Slurm's text of generic resources; (None, None) for none.

    gpu:a100:4(S:0-1), gpu:2, (null), gpu:a100:2,gpu:v100:2,nvme:1
    """
    number, kind = 0, None
    for word in re.sub(r"\([^)]*\)", "", gres).split(","):
        parts = word.split(":")
        if parts[0] == "gpu":
            counted = len(parts) > 1 and parts[-1].isdigit()
            number += int(parts[-1]) if counted else 1
            kind = kind or "".join(parts[1:-1] if counted else parts[1:]) or None
    return number or None, kind


def time_limit(text):
    """Seconds of a time limit that Slurm prints; None for infinite, UNLIMITED, n/a and the like."""
    try:
        return parse_walltime(text) or None
    except ValueError:
        return None


def least(*values):
    """The smallest of values that are not None, or None."""
    return min((value for value in values if value is not None), default=None)


def read_partitions(sinfo, scontrol):
    """Partitions from the output of `sinfo -e -h -o '%P|%c|%m|%l|%G|%D'` and `scontrol -o show
    partition`: one for each kind of nodes; those that cannot be used now are left out."""
    more = {}
    for line in scontrol.splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split())
        more[fields.get("PartitionName")] = fields
    found = {}                            # as a dict: the same kind on two lines is one
    for line in sinfo.splitlines():
        words = [word.strip() for word in line.split("|")]
        name, fields = words[0].rstrip("*"), more.get(words[0].rstrip("*"), {})
        cpus = number_in(words[1]) if len(words) == 6 else None
        if not cpus or fields.get("State", "UP") != "UP" or fields.get("RootOnly") == "YES":
            continue
        gpus, gpu_type = gpus_in(words[4])
        memory = number_in(words[2])
        memory = memory if memory and memory > 1 else None   # 1: the site has configured none
        key = (name, cpus, memory, gpus, gpu_type)
        nodes = (found[key].max_nodes if key in found else 0) + (number_in(words[5]) or 0)
        debug = "debug" in name.lower()
        found[key] = Partition(
            name, least(cpus, number_in(fields.get("MaxCPUsPerNode"))),
            least(memory, number_in(fields.get("MaxMemPerNode"))),
            time_limit(words[3]), max_nodes=nodes, gpus_per_node=gpus, gpu_type=gpu_type,
            min_nodes=number_in(fields.get("MinNodes")) or None,
            shared=not fields.get("OverSubscribe", "NO").startswith("EXCLUSIVE"),
            requires_explicit_request=debug,
            features=("default",) * words[0].endswith("*") + ("debug",) * debug)
    return tuple(one._replace(max_nodes=least(
        one.max_nodes or None, number_in(more.get(one.name, {}).get("MaxNodes"))))
        for one in found.values())


def slurm_profile(name=DYNAMIC_PROFILE, display_name=None):
    """The profile of this cluster, as its Slurm describes it. Raises TorcError."""
    partitions = read_partitions(slurm("sinfo", "-e", "-h", "-o", "%P|%c|%m|%l|%G|%D"),
                                 slurm("scontrol", "-o", "show", "partition"))
    if not partitions:
        raise TorcError("sinfo names no partition that can be used: look at it with `sinfo`")
    return Profile(name, display_name or "this cluster", "read from sinfo and scontrol", (),
                   partitions)


def partitions_named(profile, name):
    """The Partitions of a name. Raises NotFound."""
    found = [one for one in profile.partitions if one.name == name]
    if not found:
        names = dict.fromkeys(one.name for one in profile.partitions)
        raise NotFound(f"{profile.name} has no partition {name!r}{nearest(name, names)}: it has "
                       f"{', '.join(names)}")
    return found


SMALL_CPUS, SMALL_MEMORY_MB = 26, 60_000  # a job up to this prefers nodes shared with others


def lacks_of(one, cpus, memory_bytes, walltime_s, gpus=0, nodes=1, named=False):
    """What of a job a Partition cannot take, as texts; cpus, memory and gpus are those of a node.

    A job without GPUs does not take nodes that have them, unless they are named.
    """
    most_nodes = least(one.max_nodes, one.max_nodes_per_user)
    found = []
    if cpus > one.cpus_per_node:
        found.append(f"only {plural(one.cpus_per_node, 'CPU')} a node")
    if one.memory_mb is not None and memory_bytes > one.memory_mb * 2**20:
        found.append(f"only {format_bytes(one.memory_mb * 2**20)} a node")
    if one.max_walltime_secs is not None and walltime_s > one.max_walltime_secs:
        found.append(f"at most {format_duration(one.max_walltime_secs)}")
    if gpus > (one.gpus_per_node or 0):
        found.append(f"only {plural(one.gpus_per_node, 'GPU')} a node" if one.gpus_per_node
                     else "no GPUs")
    if one.gpus_per_node and not gpus and not named:
        found.append("for jobs with GPUs")
    if most_nodes is not None and nodes > most_nodes:
        found.append(f"at most {plural(most_nodes, 'node')}")
    if nodes < (one.min_nodes or 1):
        found.append(f"at least {plural(one.min_nodes, 'node')}")
    return found


def matching_partitions(profile, cpus, memory_bytes, walltime_s, gpus=0, nodes=1):
    """The Partitions that take a job, the best first; those only on request come last."""
    small = not gpus and nodes == 1 and cpus <= SMALL_CPUS and \
        memory_bytes <= SMALL_MEMORY_MB * 2**20
    return sorted(
        (one for one in profile.partitions
         if not lacks_of(one, cpus, memory_bytes, walltime_s, gpus, nodes)),
        key=lambda one: (on_request(one), not gpus and one.shared != small,
                         one.memory_mb or math.inf, one.max_walltime_secs or math.inf,
                         "default" not in one.features))


def on_request(one):
    """Whether a Partition is only for jobs that name it."""
    return one.requires_explicit_request or "debug" in one.features


def best_partition(profile, cpus, memory_bytes, walltime_s, gpus=0, nodes=1):
    """The Partition for a job that names none, or None if there is none for it.

    cpus, memory_bytes, gpus: on each of its nodes. Small jobs prefer nodes shared with others; then
    the least memory, then the closest time limit.
    """
    found = matching_partitions(profile, cpus, memory_bytes, walltime_s, gpus, nodes)
    return found[0] if found and not on_request(found[0]) else None


def need_text(cpus, memory_bytes, walltime_s, gpus=0, nodes=1):
    """What a job needs, as in "4 CPUs, 2.0 GB and 1 GPU for 2h00m"."""
    words = [plural(cpus, "CPU"), *[format_bytes(memory_bytes)] * bool(memory_bytes),
             *[plural(gpus, "GPU")] * bool(gpus)]
    where = f" on each of {nodes} nodes" if nodes > 1 else ""
    how_long = f" for {format_duration(walltime_s)}" if walltime_s else ""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) + where + how_long


def why_no_partition(profile, cpus, memory_bytes, walltime_s, gpus=0, nodes=1):
    """One sentence: what of a job is too much for which partition, the nearest first."""
    need = (cpus, memory_bytes, walltime_s, gpus, nodes)
    rows, special = {}, []
    for one in profile.partitions:
        found = lacks_of(one, *need)
        if found:
            rows.setdefault(", ".join(found), []).append(one.name)
        elif on_request(one):
            special.append(one.name)
    said = [f"{some(names)}: {text}" for text, names in
            sorted(rows.items(), key=lambda row: row[0].count(","))]
    more = f"; {len(said) - 4} more" if len(said) > 4 else ""
    asked = f"{some(special)} would, but only if it is named; " if special else ""
    return (f"no partition of {profile.name} takes {need_text(*need)} ({asked}"
            f"{'; '.join(said[:4])}{more})")


def some(names, most=4):
    """The first of some names and how many more there are."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- planning allocations

STRATEGIES = ("max-job-runtime", "max-partition-time")
SPARE_S = 120                             # walltime beyond the jobs', at least: workers start, end
WORKER_MB = 256                           # the worker's own, where a job gets what it asks for


class Wish(NamedTuple):
    """How long allocations are to be."""

    strategy: str
    multiplier: float                     # walltime over runtime, for max-job-runtime
    walltime_s: int | None                # what the user says, lengthened where jobs need more

    def walltime(self, need_s, limit):
        """Walltime in seconds, whole minutes, for jobs that need need_s <= limit (None: none)."""
        wanted = self.walltime_s
        if wanted is None and self.strategy == "max-partition-time":
            wanted = limit
        if wanted is None:
            wanted = max(need_s * self.multiplier, need_s + SPARE_S)
        return least(limit, math.ceil(max(wanted, need_s) / 60) * 60)


class Part(NamedTuple):
    """Jobs of one requirement on one partition: of one level of dependencies, or of several that
    run one after the other in the same allocations."""

    name: str
    partition: Partition
    need: Need
    runtime_s: int                        # of a job
    jobs: list
    first: list                           # those of the first level
    width: int                            # most jobs of a level
    steps: int                            # levels
    level: int                            # of the first; 0: they wait for nothing
    keys: set                             # (name, level) of its levels
    after: frozenset | None               # keys of what they wait for; None: not known

    @property
    def length_s(self):
        """Seconds that its levels take one after the other."""
        return self.runtime_s * self.steps

    @property
    def at_once(self):
        """Jobs that run at the same time in an allocation as small as one job allows."""
        one, need = self.partition, self.need
        if need.nodes > 1:
            return 1
        return max(1, least(one.cpus_per_node // need.cpus,
                            need.gpus and one.gpus_per_node // need.gpus or None,
                            one.memory_mb and one.memory_mb * 2**20 // max(1, need.memory)))

    def share(self, walltime_s):
        """Allocations of that length it fills, as a fraction."""
        rounds = max(1, (walltime_s - SPARE_S) // self.length_s)
        return self.width / (self.at_once * rounds)


def dependency_levels(jobs):
    """([level of each job], [keys of the jobs each waits for]); a key is (requirement, level).

    jobs: as in a payload, with indexes in depends_on, input_files, output_files, input_user_data,
    output_user_data. Level 0 waits for nothing; others are one above the highest they wait for.
    """
    writers = {}
    for number, job in enumerate(jobs):
        for what in ("files", "user_data"):
            for other in job.get(f"output_{what}", ()):
                writers.setdefault((what, other), []).append(number)
    parents = []
    for number, job in enumerate(jobs):
        found = set(job.get("depends_on", ()))
        for what in ("files", "user_data"):
            for other in job.get(f"input_{what}", ()):
                found.update(writers.get((what, other), ()))
        found.discard(number)
        parents.append(found)
    children, waits = {}, [len(found) for found in parents]
    for number, found in enumerate(parents):
        for parent in found:
            children.setdefault(parent, []).append(number)
    levels, free = [0] * len(jobs), [number for number, left in enumerate(waits) if not left]
    while free:
        number = free.pop()
        for child in children.get(number, ()):
            levels[child] = max(levels[child], levels[number] + 1)
            waits[child] -= 1
            if not waits[child]:
                free.append(child)
    return levels, [{(jobs[parent].get("resource_requirements"), levels[parent])
                     for parent in found} for found in parents]


def group_jobs(jobs, requirements):
    """Groups for plan_allocations: jobs of one requirement and one level of dependencies.

    jobs, requirements: records as in a payload; a job names its requirement by index.
    Raises TorcError for jobs without requirements.
    """
    bare = [job["name"] for job in jobs if job.get("resource_requirements") is None]
    if bare:
        raise TorcError(f"without resource_requirements nobody knows what to ask Slurm for: "
                        f"{plural(len(bare), 'job')} {'has' if len(bare) == 1 else 'have'} none "
                        f"({some(bare)})")
    levels, after = dependency_levels(jobs)
    groups = {}
    for job, level, keys in zip(jobs, levels, after):
        number = job["resource_requirements"]
        group = groups.setdefault((level, number), {
            **requirements[number], "jobs": [], "deferred": level > 0, "level": level,
            "after": set()})
        group["jobs"].append(job["name"])
        group["after"].update((requirements[other]["name"], above) for other, above in keys)
    return [groups[key] for key in sorted(groups)]


def choose_partition(profile, name, wish, need, runtime_s):
    """The Partition for jobs, by name or the best one. Raises TorcError with the reason."""
    size = (need.cpus, need.memory, runtime_s, need.gpus, need.nodes)
    if not name:
        longer = (*size[:2], wish.walltime(runtime_s, None), *size[3:])
        one = best_partition(profile, *longer) or best_partition(profile, *size)
        if one is None:
            raise TorcError(why_no_partition(profile, *size))
        return one
    kinds = partitions_named(profile, name)
    kinds.sort(key=lambda one: bool(one.gpus_per_node) != bool(need.gpus))
    faults = [lacks_of(one, *size, named=True) for one in kinds]
    if all(faults):
        raise TorcError(f"they need {need_text(*size)}; partition {name}: "
                        f"{'; or '.join(map(', '.join, faults))}")
    return kinds[faults.index([])]


def plan_part(group, choose):
    """The Part of a group of jobs. Raises TorcError if no partition takes them."""
    need = Need(group["num_cpus"], parse_memory(group["memory"]), group.get("num_gpus") or 0,
                group.get("num_nodes") or 1)
    runtime_s = max(1, parse_duration(group.get("runtime") or "PT1H"))
    try:
        partition = choose(need, runtime_s)
    except TorcError as error:
        raise type(error)(f"{plural(len(group['jobs']), 'job')} with the resource requirements "
                          f'"{group["name"]}": {error}') from None
    level = group.get("level", int(bool(group["deferred"])))
    after = frozenset(group["after"]) if "after" in group else None
    return Part(group["name"], partition, need, runtime_s, list(group["jobs"]), group["jobs"],
                len(group["jobs"]), 1, level, {(group["name"], level)}, after)


def join_levels(parts):
    """Parts in which levels share allocations: where as many nodes go on with jobs of the same
    requirement that wait for nothing else, within the partition's limit."""
    joined, latest = [], {}
    for part in sorted(parts, key=lambda part: part.level):
        place = latest.get(part.name)
        before = None if place is None else joined[place]
        if (before and part.partition == before.partition and part.need == before.need
                and part.level == before.level + before.steps
                and part.after is not None and part.after <= before.keys
                and math.ceil(part.width / part.at_once)
                == math.ceil(before.width / before.at_once)
                and part.runtime_s + before.length_s
                <= (part.partition.max_walltime_secs or math.inf)):
            before.jobs.extend(part.jobs)
            before.keys.update(part.keys)
            joined[place] = before._replace(width=max(before.width, part.width),
                                            steps=before.steps + 1)
        else:
            latest[part.name] = len(joined)
            joined.append(part)
    return joined


def merge_parts(parts, wish, by_partition):
    """Lists of Parts that share their allocations: on one partition, due at the same moment, with
    as many nodes a job; all of them by_partition, else if two allocations are enough."""
    groups, found = {}, []
    for part in parts:
        groups.setdefault((part.partition, part.need.nodes, part.level), []).append(part)
    for group in groups.values():
        total = sum(number_of_allocations([part], walltime_of([part], wish)) for part in group)
        found += [group] if by_partition or total <= 2 else [[part] for part in group]
    return found


def walltime_of(parts, wish):
    """Walltime in seconds of the allocations of some Parts."""
    return wish.walltime(max(part.length_s for part in parts),
                         parts[0].partition.max_walltime_secs)


def number_of_allocations(parts, walltime_s):
    """How many allocations of that length some Parts fill, never more than there are jobs."""
    needed = math.ceil(sum(part.share(walltime_s) for part in parts) - 1e-9)
    return max(1, min(needed, sum(part.width for part in parts)))


def one_allocation(parts, number, walltime_s):
    """(nodes, walltime in seconds) of a single allocation in place of `number` of them; longer
    where the partition gives fewer nodes."""
    one, size = parts[0].partition, parts[0].need.nodes
    most = least(one.max_nodes, one.max_nodes_per_user)
    fewer = number if most is None else min(number, max(1, most // size))
    if fewer < number:
        rounds = math.ceil(sum(part.width / part.at_once for part in parts) / fewer - 1e-9)
        longest = rounds * max(part.length_s for part in parts)
        walltime_s = least(one.max_walltime_secs,
                           math.ceil(max(walltime_s, longest) / 60) * 60)
    return fewer * size, walltime_s


def what_to_ask(parts, number, walltime_s):
    """Fields of a scheduler that say what to ask for on each node: all of it, or where nodes are
    shared with others what the jobs use at the same time."""
    one = parts[0].partition
    cpus, memory_mb, gpus = one.cpus_per_node, one.memory_mb, one.gpus_per_node or 0
    asked = {}
    if one.shared:
        times = [(part.need, min(part.at_once, math.ceil(part.share(walltime_s)
                                                         * part.at_once / number - 1e-9)))
                 for part in parts]
        cpus = min(cpus, sum(n * need.cpus for need, n in times))
        memory_mb = least(memory_mb, WORKER_MB + sum(n * math.ceil(need.memory / 2**20)
                                                     for need, n in times))
        gpus = min(gpus, sum(n * need.gpus for need, n in times))
    if memory_mb is not None:
        asked["mem"] = f"{memory_mb}M"
    if gpus and any(part.need.gpus for part in parts):
        asked["gres"] = f"gpu:{gpus}"
    if one.shared:                        # where Slurm gives a batch job one CPU if it says nothing
        asked["extra"] = f"--cpus-per-task={cpus}"
    return asked


def slurm_time(seconds):
    """A time as Slurm writes it: HH:MM:SS or D-HH:MM:SS."""
    days, rest = divmod(int(seconds), DAY)
    text = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text


def plan_allocations(groups, profile, account, *, partition=None, walltime=None,
                     strategy=STRATEGIES[0], multiplier=1.5, single_allocation=False,
                     by_partition=False, prefix="", deferred_suffix="_deferred"):
    """The Slurm schedulers that some jobs need, and how many allocations of each.

    groups: [{"name": of the requirement, "num_cpus", "memory", "num_gpus", "num_nodes", "runtime",
    "jobs": [names], "deferred": they wait for others}, ...]; "level" and "after", as group_jobs
    gives them, let levels share allocations. partition, walltime (text): instead of chosen ones; a
    walltime that is too short for the jobs is lengthened. by_partition: a scheduler for each.
    Returns [{"scheduler": record, "num_allocations", "jobs", "trigger", "trigger_jobs": those that
    must be ready, "start_one_worker_per_node"}, ...]. Raises TorcError when nothing fits.
    """
    import functools
    if strategy not in STRATEGIES:
        raise TorcError(f"no strategy {strategy!r}{nearest(strategy, STRATEGIES)}: there are "
                        f"{', '.join(STRATEGIES)}")
    wish = Wish(strategy, multiplier, walltime and parse_walltime(walltime))
    choose = functools.lru_cache(None)(
        functools.partial(choose_partition, profile, partition, wish))
    parts = [plan_part(group, choose) for group in groups if group["jobs"]]
    plan, taken = [], {}
    for some_parts in merge_parts(join_levels(parts), wish, by_partition):
        first = some_parts[0]
        base = first.partition.name if len(some_parts) > 1 else first.name
        base = f"{prefix}{base}{deferred_suffix if first.level else ''}"
        name = base
        while name in taken:
            taken[base] += 1
            name = f"{base}_{taken[base]}"
        taken[name] = 1
        plan.append(plan_scheduler(some_parts, wish, f"{name}_scheduler", account,
                                   single_allocation))
    return plan


def plan_scheduler(parts, wish, name, account, single_allocation):
    """An entry of a plan: the scheduler of some Parts, its allocations and jobs."""
    first = parts[0]
    walltime_s = walltime_of(parts, wish)
    number = number_of_allocations(parts, walltime_s)
    asked = what_to_ask(parts, number, walltime_s)
    nodes = first.need.nodes
    if single_allocation:
        nodes, walltime_s = one_allocation(parts, number, walltime_s)
        number = 1
    scheduler = {"name": name, "account": account, "partition": first.partition.name,
                 "nodes": nodes, "walltime": slurm_time(walltime_s), **asked}
    if first.partition.default_qos:
        scheduler["qos"] = first.partition.default_qos
    return {"scheduler": scheduler, "num_allocations": number,
            "jobs": [job for part in parts for job in part.jobs],
            "trigger": "on_jobs_ready" if first.level else "on_workflow_start",
            "trigger_jobs": [job for part in parts for job in part.first] if first.level else [],
            "start_one_worker_per_node": nodes > 1 and first.need.nodes == 1}


# ---- a specification with its allocations

def schedules_nodes(action):
    """Whether an action of a specification asks for allocations."""
    return isinstance(action, dict) and action.get("action_type") == "schedule_nodes"


def without_allocations(document):
    """A specification, as it was parsed, without schedulers and what names them."""
    bare = {name: value for name, value in document.items()
            if name not in ("slurm_schedulers", "actions")}
    bare["jobs"] = [{name: value for name, value in job.items() if name != "scheduler"}
                    for job in document.get("jobs") or ()]
    kept = [action for action in document.get("actions") or () if not schedules_nodes(action)]
    return {**bare, "actions": kept} if kept else bare


def expanded_names(document):
    """The names of the jobs that each job of a correct specification stands for, in order."""
    problems, shared = Problems("", None), document.get("parameters") or {}
    return [[one["name"] for one in
             expand(problems, (), {name: value for name, value in job.items()
                                   if value is not None}, shared, "")]
            for job in document["jobs"]]


def name_pattern(name):
    """A regular expression for the names that a job's name with placeholders stands for."""
    parts, end = [], 0
    for match in PLACEHOLDER.finditer(name):
        parts += [re.escape(name[end:match.start()]), ".+"]
        end = match.end()
    return f"^{''.join(parts)}{re.escape(name[end:])}$"


def naming(wanted, document, names):
    """The fields jobs and job_name_regexes of an action for the jobs `wanted`.

    names: of expanded_names. Many jobs with one name pattern become that pattern, if it finds no
    others; there are at most a hundred, since each is tried on all names.
    """
    wanted, total = set(wanted), sum(map(len, names))
    listed, patterns = [], []
    for job, own in zip(document["jobs"], names):
        found = [name for name in own if name in wanted]
        if len(found) == len(own) > 20 and len(own) * 100 >= total:
            pattern = name_pattern(job["name"])
            search = re.compile(pattern).search
            if all(name in wanted for name in itertools.chain(*names) if search(name)):
                patterns.append(pattern)
                continue
        listed += found
    return {**({"jobs": listed} if listed else {}),
            **({"job_name_regexes": patterns} if patterns else {})}


def with_allocations(document, plan, actions=True):
    """(specification, notes): one without allocations, with those of a plan; notes are sentences.

    Jobs name their scheduler; actions ask for the allocations unless there are to be none.
    """
    names, notes = expanded_names(document), []
    scheduler_of = {job: one["scheduler"]["name"] for one in plan for job in one["jobs"]}
    jobs = []
    for job, own in zip(document["jobs"], names):
        schedulers = list(dict.fromkeys(scheduler_of[name] for name in own))
        if len(schedulers) == 1:
            job = {**job, "scheduler": schedulers[0]}
        else:
            notes.append(f'the jobs of "{job["name"]}" belong to {len(schedulers)} schedulers '
                         f"({some(schedulers)}): they are bound to none and run in any allocation "
                         "they fit into")
        jobs.append(job)
    done = {**document, "jobs": jobs, "slurm_schedulers": [one["scheduler"] for one in plan]}
    mode = (document.get("execution_config") or {}).get("mode", "direct")
    if actions:
        done["actions"] = list(document.get("actions") or ()) + [
            {"trigger_type": one["trigger"], "action_type": "schedule_nodes",
             **naming(one["trigger_jobs"], document, names),
             "scheduler": one["scheduler"]["name"], "scheduler_type": "slurm",
             "num_allocations": one["num_allocations"],
             **({"start_one_worker_per_node": True}
                if one["start_one_worker_per_node"] and mode == "direct" else {})}
            for one in plan]
    return done, notes


def specification_text(document, as_json):
    """The text of a specification, JSON or YAML that YAML 1.1 and 1.2 read alike."""
    if as_json:
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    try:
        import yaml
    except ImportError:
        raise MissingPackage("PyYAML", "writing YAML") from None

    class Dumper(yaml.SafeDumper):
        """Quotes what either version takes for something else than a text; blocks for lines."""
        yaml_implicit_resolvers = {
            letter: [*yaml.SafeDumper.yaml_implicit_resolvers.get(letter, ()),
                     *core_loader(yaml).yaml_implicit_resolvers.get(letter, ())]
            for letter in {*yaml.SafeDumper.yaml_implicit_resolvers,
                           *core_loader(yaml).yaml_implicit_resolvers}}

        def ignore_aliases(self, data):
            return True

    Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))
    return yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


# ==================================================================================================
# 12 Server
# ==================================================================================================
# bottle and waitress are imported here and nowhere else, inside the functions. One loop over the
# table of operations: build the request, call, serialize, map errors, log.

WAITING_CLIENTS = 56                      # that may hold a thread while they wait for news
STREAMING_CLIENTS = 40                    # of those; the rest is for runners, which wait for work
GONE_CLIENT_S = 2.0                       # how often a silent stream looks whether anybody listens
SECURITY_HEADERS = (("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"))
FRONT_PAGE = ("<!DOCTYPE html><html lang=en><meta charset=utf-8><title>torc</title>"
              f"<p>A torc server. Its API is at <code>{API_PREFIX}</code>.</html>")


class Streaming(Exception):
    """Not an error: takes the headers and the Subscription of a stream past bottle."""

    def __init__(self, headers, subscription):
        super().__init__()
        self.headers, self.subscription = headers, subscription


def has_hung_up(channel):
    """Whether the other end of a connection has closed it; waitress tells only who reads on."""
    import select
    poll = select.poll()
    try:
        poll.register(channel.socket, getattr(select, "POLLRDHUP", 0x2000))
        return not channel.connected or bool(poll.poll(0))
    except (OSError, ValueError):         # closed here already
        return True


class Application:
    """The API as a WSGI application around one store."""

    def __init__(self, store, threads, log, access=Access()):
        self.store = store
        self.log = log
        self.access = access
        self.urls = ()
        self.serving = threading.BoundedSemaphore(threads)
        self.waiting = threading.BoundedSemaphore(WAITING_CLIENTS)
        self.streaming = threading.BoundedSemaphore(STREAMING_CLIENTS)

    def wsgi(self):
        """The WSGI application: bottle with one route, since it compiles each route it has.

        A stream goes around bottle, which would hold its headers until the first event.
        """
        import bottle
        app = bottle.Bottle()
        app.catchall = False
        app.route("<path:re:.*>", "ANY", self.handle)

        def serve(environ, start_response):
            try:
                return app(environ, start_response)
            except Streaming as stream:
                write = start_response("200 OK", stream.headers)
                return self.stream(stream.subscription, environ, write)
        return serve

    def stream(self, subscription, environ, write):
        """Events as they come, until the client goes or the server stops."""
        channel = environ["waitress.client_disconnected"].__self__
        try:
            write(b"")                    # the headers, before the first event
            while environ["REQUEST_METHOD"] != "HEAD":
                text = subscription.take(GONE_CLIENT_S)
                if text is None or has_hung_up(channel):
                    return
                if text:
                    yield text
                    time.sleep(0.02)      # a flood is sent in lumps
        finally:
            subscription.close()
            self.streaming.release()
            self.waiting.release()

    def begin_stream(self, endpoint, texts, request):
        """A Subscription that holds places of those who wait. Raises Unreachable without any."""
        if not self.streaming.acquire(blocking=False):
            raise Unreachable(f"{STREAMING_CLIENTS} clients follow events already: try later")
        if not self.waiting.acquire(blocking=False):
            self.streaming.release()
            raise Unreachable(f"{WAITING_CLIENTS} clients wait for news already: try later")
        try:
            return call_endpoint(endpoint, texts, request._replace(streams=True))
        except BaseException:
            self.streaming.release()
            self.waiting.release()
            raise

    def handle(self, path):
        """Answer one request."""
        import bottle
        response = bottle.response
        for name, value in SECURITY_HEADERS:
            response.set_header(name, value)
        response.set_header("X-Torc-Server", self.store.id)
        response.set_header("X-Span-Id", bottle.request.get_header("X-Span-ID")
                            or str(time.time_ns()))
        started = time.perf_counter()
        status, content_type, text = self.answer(bottle.request, path, response)
        if isinstance(text, Subscription):
            response.content_type = content_type
            response.set_header("Cache-Control", "no-cache")
            response.set_header("X-Accel-Buffering", "no")
            raise Streaming(response.headerlist, text)
        response.status = status
        if content_type:
            response.content_type = content_type
        self.log.debug("%s %s %d %.1f ms", bottle.request.method, path, status,
                       1000 * (time.perf_counter() - started))
        return text

    def answer(self, http, path, response):
        """(status, content type, body) of a request; no exception leaves this."""
        verdict = verdict_on(http) if self.access.gate else NOBODY
        if verdict.state == "busy":
            response.set_header("Retry-After", "1")
            return 503, "text/plain; charset=utf-8", BUSY
        if self.access.gate and self.access.gate.required and verdict.state != "known":
            response.set_header("WWW-Authenticate", 'Basic realm="Torc"')
            return 401, "text/plain; charset=utf-8", "Unauthorized"
        if path in ("/", "/dashboard", "/dashboard/"):
            return 200, "text/html; charset=utf-8", FRONT_PAGE
        wanted = http.get_header("X-Torc-Server")
        if wanted and wanted != self.store.id:       # the client's server was here before
            return 421, "text/plain; charset=utf-8", f"this is the Torc server {self.store.id}"
        try:
            if not path.startswith(API_PREFIX + "/"):
                raise NoSuchPath
            method = "GET" if http.method == "HEAD" else http.method
            endpoint, texts = find_endpoint(method, path[len(API_PREFIX):])
            value = self.call(http, endpoint, texts, verdict)
            if isinstance(value, Subscription):
                return 200, "text/event-stream", value
            return 200, "application/json", json.dumps(value, separators=(",", ":"))
        except NoSuchPath:
            return 404, None, ""
        except WrongMethod as error:
            response.set_header("Allow", ", ".join(error.allow))
            return 405, None, ""
        except TorcError as error:
            if error.status == 503:
                response.set_header("Retry-After", "15")
            if error.plain:
                return error.status, "text/plain; charset=utf-8", str(error)
            inner = {"message": str(error)}
            if error.status in (403, 404, 500):
                inner["error"] = error.title
            return error.status, "application/json", compact({"error": inner})
        except Exception:                 # a defect of ours: its traceback belongs in the log
            self.log.exception("unexpected error in %s %s", http.method, path)
            message = "unexpected error, see the server's log"
            return 500, "application/json", compact({"error": {
                "error": "InternalServerError", "message": message}})

    def call(self, http, endpoint, texts, verdict):
        """Run an operation; those that wait take a place of their own, so they starve nobody."""
        from urllib.parse import parse_qs
        query = parse_qs(http.query_string, keep_blank_values=True)
        body = read_json(http) if endpoint.body == JSON else None
        request = Request(self.store, verdict.user, query, body, time.time(), self.urls,
                          self.access, "unknown" if verdict.state == "wrong" else "anonymous")
        if endpoint.function is stream_events:
            return self.begin_stream(endpoint, texts, request)
        if endpoint.function is changes and query.get("wait_s", ["0"]) != ["0"]:
            if not self.waiting.acquire(blocking=False):
                query["wait_s"] = ["0"]
                return {**call_endpoint(endpoint, texts, request), "retry_after_s": 5}
            try:
                return call_endpoint(endpoint, texts, request)
            finally:
                self.waiting.release()
        with self.serving:
            return call_endpoint(endpoint, texts, request)


def read_json(http):
    """The decoded JSON body of a request. Raises UnsupportedMedia, TooLarge, BadRequest."""
    kind = (http.get_header("Content-Type") or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMedia("expected a request with `Content-Type: application/json`")
    if http.content_length > MAX_BODY_BYTES:
        raise TooLarge(f"the body is larger than {format_bytes(MAX_BODY_BYTES)}")
    try:
        return json.loads(http.environ["wsgi.input"].read())
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


# ---- connections

class Later:
    """Calls functions after a time, all in one thread."""

    def __init__(self):
        self.calls = []                   # heap of (when, number, function)
        self.numbers = itertools.count()
        self.condition = threading.Condition()
        threading.Thread(target=self._loop, daemon=True).start()

    def add(self, delay_s, function):
        """Call function() after so many seconds."""
        import heapq
        with self.condition:
            heapq.heappush(self.calls, (time.monotonic() + delay_s, next(self.numbers), function))
            self.condition.notify()

    def _loop(self):
        import heapq
        while True:
            with self.condition:
                now = time.monotonic()
                if not self.calls or self.calls[0][0] > now:
                    self.condition.wait(self.calls[0][0] - now if self.calls else None)
                    continue
                function = heapq.heappop(self.calls)[2]
            function()


def verdict_on(http):
    """The gate's Verdict on a request, which its channel keeps."""
    channel = http.environ["waitress.client_disconnected"].__self__
    return channel.judged[1]


def peer_uid(sock):
    """uid of the process on this machine at the other end of a connection, None if elsewhere.

    Asks the kernel for that one socket (sock_diag(7)); /proc/net/tcp lists thousands that are
    long closed while somebody floods us.
    """
    import socket
    import struct
    try:
        here, there = sock.getsockname(), sock.getpeername()
        hosts = [re.sub("^::ffff:(?=[0-9.]+$)", "", name[0]) for name in (there, here)]
        family = socket.AF_INET6 if ":" in hosts[0] else socket.AF_INET
        peer = struct.pack("!HH16s16s", there[1], here[1],
                           *(socket.inet_pton(family, host) for host in hosts))
        # inet_diag_req_v2: family, protocol, states; then ports, addresses, interface, cookie
        body = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + peer \
            + struct.pack("=I", 0) + b"\xff" * 8
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as kernel:     # SOCK_DIAG
            kernel.settimeout(1)
            kernel.send(struct.pack("=IHHII", 16 + len(body), 20, 1, 0, 0) + body)
            answer = kernel.recv(4096)
        kind = struct.unpack_from("=H", answer, 4)[0]
        return struct.unpack_from("=I", answer, 80)[0] if kind == 20 else None
    except (OSError, struct.error, AttributeError):
        return None


def channel_class(gate):
    """The class of the server's connections: who calls is judged before a request is served.

    A request whose password must be hashed first waits without a thread: service() returns, the
    request stays the first of its channel, and the answer of the gate makes a task of it again.
    The same holds for wrong passwords, which are answered late. This rests on waitress 3 (service,
    requests, add_task). gate: a Gate, or None.
    """
    from waitress.channel import HTTPChannel
    later = Later() if gate else None

    class Channel(HTTPChannel):
        judged = None, NOBODY             # the request at work, and the verdict on it
        liar = False                      # wrong credentials came over this connection

        def service(self):
            request = self.requests[0]
            if gate and not request.error and self.judged[0] is not request:
                header = request.headers.get("AUTHORIZATION")
                verdict = gate.judge(header, self.addr[0])
                if verdict.state == "unsure":
                    uid = peer_uid(self.socket)
                    gate.ask(header, self.addr[0] if uid is None else f"uid {uid}", verdict.digest,
                             self.liar, lambda verdict: self.decided(request, verdict))
                    return
                if verdict.delay_s:
                    self.decided(request, verdict)
                    return
                self.judged = request, verdict
            super().service()

        def decided(self, request, verdict):
            """The verdict on a request has come: serve it, a wrong one later."""
            self.judged = request, verdict
            self.liar = self.liar or verdict.state == "wrong"
            later.add(verdict.delay_s, lambda: self.server.add_task(self))

    return Channel


def tls_channel(base, tls):
    """A class of connections that speaks TLS without ever waiting for the other side: a handshake
    that hangs or is broken concerns nobody else.

    base: of channel_class(); tls: an ssl.SSLContext. This rests on waitress 3 (handle_read, send).
    """
    import ssl

    class TLSChannel(base):
        greeted = False

        def handle_read(self):
            try:
                if not isinstance(self.socket, ssl.SSLSocket):
                    self.tls_lock = threading.Lock()         # reader and writer share the object
                    self.socket = tls.wrap_socket(self.socket, server_side=True,
                                                  do_handshake_on_connect=False)
                with self.tls_lock:
                    if not self.greeted:
                        self.socket.do_handshake()
                        self.greeted = True
                    data = self.socket.recv(self.adj.recv_bytes)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except (OSError, ValueError):                    # no TLS, another version, gone
                self.handle_close()
                return
            self.last_activity = time.time()
            if data:
                self.received(data)
            else:
                self.handle_close()

        def send(self, data, do_close=True):
            try:
                with self.tls_lock:
                    return self.socket.send(data)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return 0
            except OSError:
                if do_close:              # never while the lock is held
                    self.handle_close()
                return 0

    return TLSChannel


def server_tls(certificate, key):
    """The SSLContext of the server's certificate: TLS 1.2 and newer. Raises UsageError,
    Unreachable for files that are missing or do not belong together."""
    import ssl
    if not certificate or not key:
        raise UsageError("--https needs --tls-cert FILE and --tls-key FILE (PEM)")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def no_password():
        raise Unreachable(f"{key} is protected by a password: openssl pkey -in {key} -out NEW "
                          "writes a key without one (keep it 0600)")

    for path in (certificate, key):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise Unreachable(f"{path}: {error.strerror}") from None
    try:
        context.load_cert_chain(certificate, key, no_password)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        text = {"KEY_VALUES_MISMATCH": "they do not belong together"}.get(
            reason, f"they are not a certificate and its key in PEM ({reason})")
        raise Unreachable(f"{certificate} and {key}: {text}") from None
    return context


# ---- sockets

def port_holder(port):
    """Who listens on a port, as " (pid 4242, python)", or "" when that cannot be seen."""
    inodes = {f"socket:[{words[9]}]" for words in listening(port)}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") in inodes:
                        with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
                            return f" (pid {pid}, {file.read().strip()})"
    return " (by another user's process)" if inodes else ""


def bind_sockets(host, port):
    """Listening sockets on all local addresses of a host name, all on one port; 0 takes a free one.

    Raises Unreachable: host unknown or not of this machine, port in use or not allowed.
    """
    import socket
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise Unreachable(f"the host name {host!r} is unknown: take 127.0.0.1 (this machine only), "
                          "0.0.0.0 (all its addresses), or a name of this machine") from None
    sockets = []
    try:
        for family, address in dict.fromkeys((row[0], row[4]) for row in found):
            sock = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
            sock.bind((address[0], port, *address[2:]))
            sock.listen(1024)
            port = sock.getsockname()[1]  # further addresses take the port the first one got
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise bind_trouble(error, host, port) from None
    return sockets


def bind_trouble(error, host, port):
    """Why a socket could not be bound, and the option that helps."""
    if error.errno == errno.EADDRINUSE:
        return Unreachable(f"port {port} on {host} is in use{port_holder(port)}: stop it, or take "
                           f"--port {port + 1}, or --port 0 for any free one")
    if error.errno == errno.EACCES:
        return Unreachable(f"port {port} is reserved for root: take --port {DEFAULT_PORT}, or "
                           "--port 0 for any free one")
    if error.errno == errno.EADDRNOTAVAIL:
        return Unreachable(f"{host} is not an address of this machine: take 127.0.0.1 or 0.0.0.0")
    return Unreachable(f"port {port} on {host} cannot be used: {error.strerror}")


BRIDGES = re.compile(r"(docker|podman|br-|virbr|veth|cni|flannel|cali|lxc|lxd|vmnet|tun|tap)")


def own_addresses():
    """Addresses of this machine's interfaces by which others can reach it, IPv4 first.

    Without loopback, link-local ones, and the bridges of containers (netdevice(7), proc(5)).
    """
    import fcntl
    import socket
    import struct
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            if not BRIDGES.match(name):
                with contextlib.suppress(OSError):           # SIOCGIFADDR
                    data = fcntl.ioctl(asker, 0x8915, struct.pack("256s", name.encode()[:15]))
                    found.append(socket.inet_ntoa(data[20:24]))
    for row in read_text("/proc/net/if_inet6").splitlines():
        digits, _, _, scope, _, name = row.split()
        if scope == "00" and not BRIDGES.match(name):        # global
            found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return [address for address in dict.fromkeys(found)
            if not address.startswith(("127.", "169.254."))]


def own_names(addresses, seconds=2.0):
    """Names of this machine that do not lead to loopback, as far as they are found in time."""
    import socket
    found = []

    def look():
        for address in addresses:
            with contextlib.suppress(OSError):
                found.append(socket.gethostbyaddr(address)[0])
        with contextlib.suppress(OSError):
            found.append(socket.getfqdn())

    looker = threading.Thread(target=look, daemon=True)      # a name server may be far away
    looker.start()
    looker.join(seconds)
    return [name for name in dict.fromkeys(found) if any(
        address in addresses for address in resolved(name))]


def public_urls(scheme, host, port, sockets):
    """URLs that other machines can use, the most useful first; none if only this one can."""
    bound = {sock.getsockname()[0] for sock in sockets}
    if bound & {"0.0.0.0", "::"}:
        addresses = [address for address in own_addresses() if ":" not in address or "::" in bound]
        hosts = own_names(addresses) + addresses
    else:
        hosts = [] if all(map(is_loopback, bound)) else [host, *sorted(bound)]
    return [make_url(scheme, name, port) for name in dict.fromkeys(hosts) if not is_loopback(name)]


def local_url(scheme, sockets):
    """The URL for this machine itself."""
    address, port = sockets[0].getsockname()[:2]
    return make_url(scheme, {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address), port)


# ---- logging

class JsonLines:
    """Formats a log record as one line of JSON (a logging.Formatter by duck typing)."""

    def format(self, record):
        """One line."""
        line = {"timestamp": iso_time(record.created), "level": record.levelname,
                "message": record.getMessage()}
        if record.exc_info:
            import traceback
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return compact(line)


def quiet_stderr():
    """stderr as a stream that neither blocks nor fails when nobody reads it any more.

    A pipe is opened anew without blocking: that leaves the flags of others who share it alone.
    """
    import stat
    try:
        if stat.S_ISFIFO(os.fstat(2).st_mode):
            fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            return open(fd, "w", encoding="utf-8", errors="replace", buffering=1)
    except OSError:
        pass
    return sys.stderr


def make_log(level, directory, as_json):
    """The server's logger: stderr, and <directory>/torc-server.log (10 MiB, 5 kept).

    Raises UsageError for an unknown level, Unreachable for a directory that cannot be written.
    """
    import logging
    import logging.handlers
    names = {"trace": "DEBUG", "warn": "WARNING"}
    number = logging.getLevelName(names.get(level.lower(), level.upper()))
    if not isinstance(number, int):
        raise UsageError(f"log level {level!r}: take error, warn, info, debug or trace")
    logging.raiseExceptions = False       # a closed stderr must not disturb the server
    handlers = [logging.StreamHandler(quiet_stderr())]
    if directory:
        try:
            os.makedirs(directory, exist_ok=True)
            handlers.append(logging.handlers.RotatingFileHandler(
                os.path.join(directory, "torc-server.log"), maxBytes=10 * 2**20, backupCount=5))
        except OSError as error:
            raise Unreachable(f"log directory {directory}: {error.strerror}: name another with "
                              "--log-dir") from None
    log = logging.getLogger("torc")
    log.handlers = []
    for handler in handlers:
        handler.setFormatter(JsonLines() if as_json else logging.Formatter(
            "%(asctime)s %(levelname)-7s %(message)s"))
        log.addHandler(handler)
    log.setLevel(number)
    logging.getLogger("waitress").setLevel(logging.ERROR)
    logging.getLogger("waitress.queue").setLevel(logging.CRITICAL)
    return log


# ---- life of the server

def watch_leases(store, log, stop):
    """Fail the jobs of runners that have been silent for longer than their lease (a thread)."""
    started = time.monotonic()
    wait = 1.0
    while not stop.wait(wait):
        try:
            expired, wait = expired_nodes(store, time.monotonic(), started)
            for node_id in expired:
                with store.transaction():
                    expire_node(store, node_id, time.time())
                log.warning("compute node %d was silent for too long: its jobs have failed",
                            node_id)
            wait = min(max(wait, 0.1), 60.0)
        except TorcError as error:        # a full disk, say: the next round tries again
            log.error("looking after leases: %s", error)
            wait = 10.0


def write_note(store, urls):
    """Tell clients on the same home where this server is; returns the note's path, or None."""
    import socket
    path = server_note(store.id)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        write_private(path, compact({"id": store.id, "urls": urls, "pid": os.getpid(),
                                     "host": socket.gethostname(), "database": store.path}))
        return path
    except (OSError, Unreachable):
        return None                       # a home that cannot be written: clients do without


def remove_note(path):
    """Remove the note, unless a newer server has written it."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        with open(path, encoding="utf-8") as file:
            if json.load(file)["pid"] == os.getpid():
                os.unlink(path)


def raise_file_limit():
    """Take all the file descriptors we may have; returns how many."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
        soft = min(hard, 65_536)
    return soft


def announce(args, port, application, urls):
    """The one line on stdout, and for people where the server is and who could reach it."""
    log, access, path = application.log, application.access, application.store.path
    with contextlib.suppress(OSError, ValueError):
        print(f"TORC_SERVER_PORT={port}", flush=True)
    log.info("torc %s serves %s at %s", VERSION, path, ", ".join(dict.fromkeys(urls)))
    users = len(access.gate.file.users) if access.gate else 0
    if not is_loopback(args.host) and not (access.gate and access.gate.required):
        log.warning("whoever reaches port %d on %s can read and change all workflows, and so run "
                    "commands as the users whose runners work here: --auth-file FILE "
                    "--require-auth asks for passwords, --host 127.0.0.1 keeps it to this machine",
                    port, args.host)
    elif not is_loopback(args.host) and not args.https:
        log.warning("passwords travel as they are to port %d on %s: --https --tls-cert FILE "
                    "--tls-key FILE hides them from the network", port, args.host)
    if users > 1 and not access.enforced:
        log.warning("each of the %d users can read and change the workflows of all, and so run "
                    "commands in their names: --enforce-access-control keeps them apart", users)


def server_access(args, log):
    """The Access that the options ask for. Raises UsageError, Unreachable."""
    if not args.auth_file:
        for option, wanted in (("--require-auth", args.require_auth),
                               ("--enforce-access-control", args.enforce_access_control)):
            if wanted:
                raise TorcError(f"{option} needs --auth-file FILE with the users' passwords: "
                                "torc-htpasswd add --file FILE USER makes one")
        return Access()
    with contextlib.suppress(OSError):
        if os.stat(args.auth_file).st_mode & 0o077:
            log.warning("others can read or change the password file %s: chmod 600 %s",
                        args.auth_file, args.auth_file)
    gate = Gate(args.auth_file, args.require_auth, args.credential_cache_ttl_secs, log.warning)
    return Access(gate, args.enforce_access_control)


# ---- in the background

class ServerProcess(NamedTuple):
    """A server that runs in the background."""

    pid: int
    since: float                          # seconds since the epoch
    urls: tuple                           # as its note tells them
    database: str


def default_pid_file():
    """Where the pid of a server in the background is kept, unless --pid-file says otherwise."""
    return os.path.join(torc_home(), "torc-server.pid")


def running_server(pid_file):
    """The ServerProcess that a pid file names, None if that has ended.

    A process that began after the file was written has only taken over the number.
    """
    text = read_text(pid_file)
    ticks = process_start(int(text)) if text.isdigit() else None
    if ticks is None or b"server" not in read_bytes(f"/proc/{text}/cmdline"):
        return None
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    since = boot + ticks / os.sysconf("SC_CLK_TCK")
    if since > os.stat(pid_file).st_mtime + 1:
        return None
    notes = os.path.join(torc_home(), "servers")
    for name in os.listdir(notes) if os.path.isdir(notes) else ():
        with contextlib.suppress(OSError, ValueError, KeyError):
            with open(os.path.join(notes, name), encoding="utf-8") as file:
                note = json.load(file)
            if note["pid"] == int(text):
                return ServerProcess(int(text), since, tuple(note["urls"]), note["database"])
    return ServerProcess(int(text), since, (), "")


def read_bytes(path):
    """A file's bytes, or none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def wait_for_end(pid, seconds):
    """Whether a process, which need not be our child, ends within so many seconds."""
    import select
    deadline = time.monotonic() + seconds
    try:
        handle = os.pidfd_open(pid)
        try:
            poller = select.poll()
            poller.register(handle, select.POLLIN)
            return bool(poller.poll(1000 * seconds))
        finally:
            os.close(handle)
    except ProcessLookupError:
        return True
    except (OSError, AttributeError):     # a kernel before 5.3
        while process_start(pid) is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        return process_start(pid) is None


def go_to_background(args):
    """Fork for --daemon: returns (None, exit code) in the process that was started by the user,
    and (function to call when the server is ready, None) in the one that is to serve.

    The first waits until the second is ready or has failed; until then both write to the same
    stderr, so that a failure looks like one in the foreground. Raises Conflict if the pid file
    names a server that runs.
    """
    import signal
    args.pid_file = os.path.abspath(args.pid_file or default_pid_file())
    other = running_server(args.pid_file)
    if other:
        where = f" at {other.urls[0]}" if other.urls else ""
        raise Conflict(f"a server runs in the background already (pid {other.pid}{where}, since "
                       f"{local_time(other.since)}): torc server stop ends it, --pid-file FILE is "
                       "for one more")
    args.log_dir = os.path.abspath(args.log_dir or os.path.join(torc_home(), "logs"))
    os.makedirs(os.path.dirname(args.pid_file), mode=0o700, exist_ok=True)
    os.makedirs(args.log_dir, mode=0o700, exist_ok=True)
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            ready = pipe.read(1)
        if ready:
            return None, 0
        return None, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(read_end)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def ready():
        write_private(args.pid_file, f"{os.getpid()}\n")
        print(f"torc: the server runs in the background (pid {os.getpid()}), its log is "
              f"{os.path.join(args.log_dir, 'torc-server.log')}; torc server stop ends it"
              + logout_hint(), file=sys.stderr, flush=True)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.write(write_end, b"r")
        os.close(write_end)

    return ready, None


def logout_hint():
    """What to do where logging out ends what a user has started (logind.conf(5)), or ""."""
    import shutil
    if not os.path.isdir("/run/systemd/system") or not shutil.which("loginctl"):
        return ""
    with contextlib.suppress(TorcError, OSError):
        if run_program(["loginctl", "show-user", str(os.getuid()), "-p", "Linger"], 5)[1].strip() \
                == "Linger=yes":
            return ""
    return ("\ntorc: if it ends when you log out, this machine ends what its users leave behind: "
            f"`loginctl enable-linger {user_name()}` allows it, if the site does")


# ---- service: systemd

UNIT_NAME = "torc-server.service"
UNIT = """\
[Unit]
Description=Torc workflow server
After=network-online.target

[Service]
Type=simple
ExecStart={command}
WorkingDirectory={directory}
Restart=on-failure
RestartSec=5
UMask=0077

[Install]
WantedBy={target}
"""


def unit_word(word):
    """A word of ExecStart as systemd reads it back: systemd.syntax(7), systemd.service(5)."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"' if re.search(r"[^\w@%+=:,./$-]", word) or not word else word


def unit_text(words, directory, user):
    """The unit that starts a server with these words. user: for one user, not for the system."""
    return UNIT.format(command=" ".join(map(unit_word, words)),
                       directory=directory.replace("%", "%%"),
                       target="default.target" if user else "multi-user.target")


def unit_path(user):
    """Where the unit is kept."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(home, "systemd", "user", UNIT_NAME) if user else \
        os.path.join("/etc/systemd/system", UNIT_NAME)


def systemctl(user, *words):
    """(exit code, what it said) of systemctl; (None, why) where systemd does not run."""
    import shutil
    if not shutil.which("systemctl") or not os.path.isdir("/run/systemd/system"):
        return None, "systemd does not run here"
    code, out, err = run_program(["systemctl", *(["--user"] if user else []), *words], 60)
    return code, (out + err).strip()


# ---- serving

def serve(args):
    """Run the server until SIGINT or SIGTERM; returns the exit code.

    args: host, port, database, threads, log_level, log_dir, json_logs, daemon, pid_file, and the
    options on passwords and TLS.
    """
    import signal
    os.umask(0o077)                       # logs and notes are the user's own
    ready = None
    if args.daemon:
        ready, code = go_to_background(args)
        if not ready:
            return code
    try:
        from waitress.server import create_server
    except ImportError:
        raise MissingPackage("waitress", "the server") from None
    try:
        import bottle                     # noqa: F401  (missing: say so before anything is made)
    except ImportError:
        raise MissingPackage("bottle", "the server") from None
    sys.setswitchinterval(0.0001)         # SQLite gives up the interpreter's lock at every step
    log = make_log(args.log_level, args.log_dir, args.json_logs)
    access = server_access(args, log)
    tls = server_tls(args.tls_cert, args.tls_key) if args.https else None
    database = server_database(args.database, log)
    sockets = bind_sockets(args.host, args.port)
    store = Store(database, server=True)
    set_admins(store, args.admin_user)
    application = Application(store, args.threads, log, access)
    limit = raise_file_limit()
    loop = {}                             # waitress registers its listeners here
    server = create_server(
        application.wsgi(), loop, sockets=sockets, threads=args.threads + WAITING_CLIENTS,
        connection_limit=max(50, min(limit - 100, 4000)), asyncore_use_poll=True, ident=None,
        channel_timeout=130, max_request_body_size=MAX_BODY_BYTES + 2**20,
        log_socket_errors=False, recv_bytes=65_536, url_scheme="https" if tls else "http")
    connection_class = channel_class(access.gate)
    if tls:
        connection_class = tls_channel(connection_class, tls)
    for listener in [entry for entry in loop.values() if hasattr(entry, "channel_class")]:
        listener.channel_class = connection_class
    port = sockets[0].getsockname()[1]
    scheme = "https" if tls else "http"
    application.urls = public_urls(scheme, args.host, port, sockets)
    note = write_note(store, [local_url(scheme, sockets), *application.urls])
    stop = threading.Event()
    threading.Thread(target=watch_leases, args=(store, log, stop), daemon=True).start()

    def end(number, frame):
        stop.set()
        for sock in sockets:
            sock.close()
        store.wake()
        raise SystemExit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        announce(args, port, application, [local_url(scheme, sockets), *application.urls])
        if ready:
            ready()
            log.handlers = [handler for handler in log.handlers if hasattr(handler, "baseFilename")]
        server.run()                      # ends by SystemExit, after requests at work are answered
    except SystemExit:
        pass
    finally:
        store.close()
        remove_note(note)
        if ready and read_text(args.pid_file) == str(os.getpid()):
            os.unlink(args.pid_file)
        log.info("stopped")
    return 0


def server_database(named, log):
    """Path of the server's database: option, DATABASE_URL (sqlite:PATH), or torc.db here."""
    if named:
        return named
    url = os.environ.get("DATABASE_URL", "")
    if url.startswith("sqlite:"):
        return re.sub(r"^sqlite:(//)?", "", url).partition("?")[0]
    if url:
        raise UsageError(f"DATABASE_URL={url!r}: expected sqlite:PATH")
    log.info("no --database given: taking %s", os.path.abspath("torc.db"))
    return "torc.db"


# ==================================================================================================
# 14 Command line
# ==================================================================================================
# A command is a function of (args, client) with its options beside it; COMMANDS holds them all and
# feeds parser, help and completion. argparse builds only the parser of the command that is called.
# A command fetches, then prints through show_list, show_record or say: a table or JSON. What goes
# wrong is raised and shown once, by main.

class Command(NamedTuple):
    """A command as it is typed, with its options and how it wants its client."""

    name: str
    function: Any
    options: tuple
    text: str                             # what it does; the first line is the summary
    example: str
    client: Any                           # True, False: needs none, "make": makes the local file

    @property
    def summary(self):
        """One line about it."""
        return self.text.partition("\n")[0]


COMMANDS = {}                             # by the words that are typed: "jobs list"
HIDDEN = "hidden"                         # as help: the option is accepted and not shown
LOG_LEVELS = ("error", "warn", "info", "debug", "trace")


def opt(*flags, **settings):
    """An option or positional argument, as argparse's add_argument takes it."""
    return flags, settings


def command(name, *options, example, client=True, summary=None):
    """Register a function as a command; its docstring is its help, unless there is a summary."""
    def register(function):
        COMMANDS[name] = Command(name, function, options,
                                 summary or function.__doc__, example, client)
        return function
    return register


# ---- values of options

def readable(convert):
    """A converter for argparse whose ValueError is shown as it is."""
    def converted(text):
        import argparse
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return converted


def bounded(kind, least, what):
    """A converter for numbers that are not below `least`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < 2**63:
            raise ValueError(f"{text!r} is not {what}")
        return value
    return readable(convert)


def parse_moment(text):
    """Seconds since the epoch of a time such as 2026-01-02T03:04:05Z; local without an offset."""
    import datetime
    try:
        # Python before 3.11 wants three or six digits of a second, and no Z.
        match = re.fullmatch(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(\.\d+)?(Z|[-+]\d\d:\d\d)?",
                             text.strip(), re.I)
        zone = {"Z": "+00:00", None: ""}.get(match[3] and match[3].upper(), match[3])
        moment = datetime.datetime.fromisoformat(match[1].upper() + zone)
        return moment.timestamp() + float(match[2] or 0)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a time such as 2026-01-02T03:04:05Z") from None


def json_value(text):
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not JSON ({error}); a text needs quotes of its own: "
                         "'\"text\"'") from None


def parse_ids(text):
    """Ids from "3" or "3,4,5"."""
    if not re.fullmatch(r"\d{1,18}(,\d{1,18})*", text):
        raise ValueError(f"{text!r} is not an id or a list such as 3,4,5")
    return [int(word) for word in text.split(",")]


def parse_truth(text):
    """true or false."""
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"


def checked_text(parse):
    """A converter that gives the text as it is, if `parse` takes it."""
    def convert(text):
        parse(text)
        return text
    return readable(convert)


COUNT = bounded(int, 0, "a number from 0 on")
POSITIVE = bounded(int, 1, "a number from 1 on")
IDS_TYPE = readable(parse_ids)
TRUTH = readable(parse_truth)
JSON_VALUE = readable(json_value)
MEMORY = checked_text(parse_memory)
RUNTIME = checked_text(parse_duration)
WORKFLOW = opt("workflow_id", nargs="?", type=COUNT, metavar="WORKFLOW_ID",
               help="default: the only workflow you have, else you are asked")
ID = opt("id", type=COUNT, metavar="ID")
LIST_IDS = opt("ids", nargs="+", type=IDS_TYPE, metavar="ID")
DRY_RUN = opt("--dry-run", action="store_true", help="say what would happen, change nothing")
FORCE = opt("--force", action="store_true", help="do not ask")
NO_PROMPTS = opt("--no-prompts", action="store_true", help="do not ask")
OUTPUT_DIR = opt("-o", "--output-dir", default=DEFAULT_OUTPUT_DIR, metavar="DIR",
                 help=f"where logs and the local database are (default: {DEFAULT_OUTPUT_DIR})")


WORKER_URL = opt("--worker-url", action="append", metavar="URL", help="where compute nodes are to "
                 "look for the server, if torc cannot know (TORC_WORKER_URL); may be repeated")
MAX_PARALLEL = opt("-m", "--max-parallel-jobs", type=POSITIVE, metavar="N",
                   help="each worker runs so many at a time, whatever they need")
KEEP_SCRIPTS = opt("--keep-submission-scripts", action="store_true",
                   help="leave the batch scripts in the output directory")
POLL = opt("-p", "--poll-interval", type=float, help=HIDDEN)
WORKERS = (OUTPUT_DIR, WORKER_URL, MAX_PARALLEL, KEEP_SCRIPTS, POLL)


def paging(offset=(), sort_by=(), reverse=()):
    """The options of every list; some lists have short forms for them."""
    return (opt("-l", "--limit", type=COUNT, metavar="N", help="at most so many"),
            opt(*offset, "--offset", type=COUNT, default=0, metavar="N", help="leave out so many"),
            opt(*sort_by, "--sort-by", metavar="FIELD", help="a field of the JSON output"),
            opt(*reverse, "--reverse-sort", action="store_true", help="largest first"))


PAGING = paging()
SHORT_PAGING = paging(["-o"], ["-s"], ["-r"])
GLOBAL = (
    opt("-f", "--format", choices=("table", "json"), default="table",
        help="how to print (default: table)"),
    opt("--database", metavar="FILE", help="work on this database file, without a server "
        "(TORC_DATABASE)"),
    opt("--url", metavar="URL", help=f"work with this server, such as {DEFAULT_URL} "
        "(TORC_API_URL)"),
    opt("--prompt-password", action="store_true", help="ask for the server's password; the "
        "environment's is TORC_PASSWORD, the user TORC_USERNAME or USER"),
    opt("--password", metavar="TEXT", help="visible to everybody in the list of processes: better "
        "TORC_PASSWORD or --prompt-password"),
    opt("--tls-ca-cert", metavar="FILE", help="PEM of the CA that signed the server's certificate "
        "(TORC_TLS_CA_CERT)"),
    opt("--tls-insecure", action="store_true", help="take any certificate: anybody between here "
        "and the server can then read along (TORC_TLS_INSECURE)"),
    opt("--cookie-header", metavar="TEXT", help="a Cookie header for sites behind a login page "
        "(TORC_COOKIE_HEADER)"),
    opt("--log-level", choices=LOG_LEVELS, help="what is said on stderr (RUST_LOG; default: info)"),
    opt("--skip-version-check", action="store_true", help="accepted, nothing is checked"),
    opt("-V", "--version", action="store_true", help="print version and hash of this program"),
    opt("-h", "--help", action="store_true", help="print help, also behind a command"),
)


# ---- parsing

def default_log_level():
    """RUST_LOG if it is one of our levels."""
    level = os.environ.get("RUST_LOG", "").lower()
    return level if level in LOG_LEVELS else "info"


def branches():
    """Command words that others follow, such as "jobs"; {word: [words that follow]}."""
    found = {}
    for name in COMMANDS:
        words = name.split()
        for index in range(1, len(words)):
            following = found.setdefault(" ".join(words[:index]), [])
            if words[index] not in following:
                following.append(words[index])
    return found


def flags_of(options):
    """{flag: settings} of options, positional arguments left out."""
    return {flag: settings for flags, settings in options for flag in flags if flag[0] == "-"}


def has_value(settings):
    """Whether an option is followed by a value."""
    return settings.get("action") not in ("store_true", "store_false")


def find_command(argv):
    """(global options before the command, the command's words, the rest) of a command line."""
    known, known_branches = flags_of(GLOBAL), branches()
    head, name, index = [], "", 0
    while index < len(argv):
        word = argv[index]
        if word[:1] == "-" and len(word) > 1:
            if name in COMMANDS:
                break
            flag = word.partition("=")[0] if word[:2] == "--" else word[:2]
            if flag not in known:
                raise UsageError(f"unknown option {flag}{nearest(flag, known)}: see torc --help")
            long = 1 + (has_value(known[flag]) and flag == word)
            if len(argv) < index + long:
                raise UsageError(f"option {flag} needs a value: see torc --help")
            head += argv[index:index + long]
            index += long
            continue
        longer = f"{name} {word}".strip()
        if longer not in COMMANDS and longer not in known_branches:
            break
        name, index = longer, index + 1
    return head, name, argv[index:]


def build_parser(name, options, description="", example=""):
    """argparse's parser of one command; global options are added where they do not collide."""
    import argparse
    epilog = f"Global options, such as -f json and --url, go anywhere: torc --help\n\n" \
             f"Example:\n  {example}"
    parser = argparse.ArgumentParser(
        prog=f"torc {name}".strip(), description=description, epilog=epilog, allow_abbrev=False,
        add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def complain(message):
        raise UsageError(f"{message}: see {parser.prog} --help")

    parser.error = complain
    taken = flags_of(options)
    for flags, settings in options:
        hidden = {"help": argparse.SUPPRESS} if settings.get("help") == HIDDEN else {}
        parser.add_argument(*flags, **{**settings, **hidden})
    for flags, settings in GLOBAL:
        free = [flag for flag in flags if flag not in taken]
        if free:                          # without a default, which would undo what stood before
            parser.add_argument(*free, **{**settings, "default": argparse.SUPPRESS,
                                          "help": argparse.SUPPRESS})
    return parser


def check_options(found, rest):
    """Raise UsageError for an option that the command does not have, with the nearest one."""
    known = {**flags_of(GLOBAL), **flags_of(found.options)}
    for word in rest:
        if word == "--":
            return
        flag = word.partition("=")[0] if word[:2] == "--" else word[:2]
        if re.match(r"--?[A-Za-z]", word) and " " not in word and flag not in known:
            raise UsageError(f"torc {found.name} has no option {flag}{nearest(flag, known)}: see "
                             f"torc {found.name} --help")


def parse_command(found, head, rest):
    """The values of a command line as a namespace."""
    check_options(found, rest)
    args = build_parser("", GLOBAL).parse_args(head)
    if args.log_level is None:
        args.log_level = default_log_level()
    parser = build_parser(found.name, found.options)
    # Intermixed: an optional WORKFLOW_ID may then stand behind the options too.
    return parser.parse_intermixed_args(rest, args)


def wants(words, short, long):
    """Whether an option without a value is among the words before "--"."""
    before = words[:words.index("--")] if "--" in words else words
    return any(word in (short, long) for word in before)


def wants_json(argv):
    """Whether the output is to be JSON, known before anything is parsed."""
    pairs = list(zip(argv, [*argv[1:], ""]))
    return ("-f", "json") in pairs or ("--format", "json") in pairs or "--format=json" in argv \
        or "-fjson" in argv


# ---- help

GROUPS = (
    ("Workflows", "run create submit examples status wait cancel delete workflows"),
    ("Jobs and their output", "why logs jobs results"),
    ("What belongs to a workflow", "files user-data resource-requirements failure-handlers "
     "job-dependencies events compute-nodes scheduled-compute-nodes"),
    ("Clusters", "watch recover slurm slurm-job-runner hpc"),
    ("Server and program", "server ping doctor htpasswd access-groups admin completions bundle"),
)
BRANCH_SUMMARIES = {
    "htpasswd": "The server's password file: add, remove, list and verify users.",
    "access-groups": "Groups of users with whom workflows are shared.",
    "admin": "For admins of a server.",
    "server service": "The server as a service of systemd.",
    "slurm": "Slurm: schedulers of a workflow, allocations, accounting.",
    "workflows": "Workflows: list, reset, initialize, archive.",
    "jobs": "Jobs: list, change, cancel, run again.",
    "results": "Results of jobs.",
    "files": "Files that jobs read and write.",
    "user-data": "JSON values that jobs read and write.",
    "resource-requirements": "What jobs need: CPUs, memory, GPUs, time.",
    "failure-handlers": "Rules for failed jobs.",
    "job-dependencies": "Which job waits for which.",
    "events": "What happened in a workflow.",
    "compute-nodes": "Runners of a workflow.",
    "scheduled-compute-nodes": "Allocations of a workflow.",
    "hpc": "HPC systems: their partitions, and which of them suits a job.",
}
ABSENT = ("tui", "dash", "remote", "plot-resources", "ro-crate", "config", "mcp-server")


def summary_of(word):
    """One line about a command or a branch of commands."""
    return BRANCH_SUMMARIES.get(word) or COMMANDS[word].summary


def overview():
    """The help of torc itself."""
    lines = ["torc: run workflows of many jobs on this machine or a cluster.", "",
             "Usage: torc [OPTIONS] COMMAND ...", ""]
    for title, words in GROUPS:
        lines += [f"{title}:", *(f"  {word:<24}{summary_of(word)}" for word in words.split()), ""]
    lines.append("Options, before or behind the command:")
    for flags, settings in GLOBAL:
        text = ", ".join(flags) + (f" {settings.get('metavar', 'NAME')}"
                                   if has_value(settings) else "")
        lines.append(f"  {text:<24}{settings['help']}")
    return "\n".join([*lines, "", "Example:", "  torc run --example hello"])


def branch_help(branch):
    """The help of a word that only begins commands."""
    names = [name for name in COMMANDS if name.startswith(branch + " ")]
    width = max(map(len, names)) + 2
    return "\n".join([summary_of(branch), "", f"Usage: torc {branch} COMMAND ...", "",
                      *(f"  {name:<{width}}{COMMANDS[name].summary}" for name in names), "",
                      "Example:", f"  {COMMANDS[names[0]].example}"])


def command_help(found):
    """The help of a command."""
    text = "\n".join(line.strip() for line in found.text.splitlines()).strip()
    return build_parser(found.name, found.options, text, found.example).format_help().rstrip()


def unknown_command(name, word):
    """The UsageError for a word that is no command."""
    if not name and word in ABSENT:
        return UsageError(f"torc {word} is not in this version")
    known = branches()[name] if name else {first.partition(" ")[0] for first in COMMANDS}
    place = f"torc {name}".strip()
    return UsageError(f"{place} has no command {word!r}{nearest(word, sorted(known))}: see {place} "
                      "--help")


# ---- output

def clean(text):
    """A text that cannot move the terminal's cursor or break a line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text).strip()


CELLS = {"st_mtime": local_time, "timestamp": local_time, "peak_memory_bytes": format_bytes,
         "duration_seconds": format_duration, "executed_at": local_time,
         "exec_time_minutes": lambda minutes: f"{minutes:.3f}",
         "avg_cpu_percent": lambda percent: f"{percent:.1f}"}


def cell(record, name):
    """A field of a record as text of one line."""
    value = record.get(name)
    if value is None:
        return ""
    if name in CELLS:
        return CELLS[name](value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}"
    return clean(value if isinstance(value, str) else compact(value))


def text_width(text):
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.combining(letter) else
               2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def shorten(text, width):
    """A text cut to a width, marked where it was cut."""
    if text_width(text) <= width:
        return text
    kept = text[:max(0, width - 2)]
    while text_width(kept) > max(0, width - 2):
        kept = kept[:-1]
    return kept + ".."


def fit_widths(widths, room):
    """Column widths that fit into `room`: the widest give way first, none below 8."""
    widths = list(widths)
    while sum(widths) > room and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    return widths


def table_lines(titles, rows):
    """Lines of a table: rules on a UTF-8 terminal, else plain columns; numbers to the right."""
    terminal = sys.stdout.isatty()
    drawn = terminal and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    between, rule = (" \u2502 ", "\u2500") if drawn else ("  ", "-")
    widths = [max(map(text_width, column)) for column in zip(titles, *rows)]
    if terminal:
        import shutil
        room = shutil.get_terminal_size().columns - len(between) * (len(titles) - 1)
        widths = fit_widths(widths, room)
        rows = [[shorten(text, width) for text, width in zip(row, widths)] for row in rows]
    right = [all(re.fullmatch(r"-?[\d.]*%?", text) for text in column) for column in zip(*rows)]

    def line(texts):
        padded = [" " * (width - text_width(text)) + text if flush else
                  text + " " * (width - text_width(text))
                  for text, width, flush in zip(texts, widths, right)]
        return between.join(padded).rstrip()

    crossing = rule + "\u253c" + rule if drawn else between
    return [line(titles), crossing.join(rule * width for width in widths), *map(line, rows)]


def print_json(value):
    """Print JSON; long lists one record a line, since indenting them takes seconds."""
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    if isinstance(value, dict) and any(isinstance(part, list) and len(part) > 1000
                                       for part in value.values()):
        parts = (f"{json.dumps(key)}: " + (
            "[\n" + ",\n".join(json.dumps(item, ensure_ascii=plain) for item in part) + "\n]"
            if isinstance(part, list) else json.dumps(part, ensure_ascii=plain))
            for key, part in value.items())
        print("{" + ",\n".join(parts) + "}")
    else:
        print(json.dumps(value, indent=2, ensure_ascii=plain))


def split_columns(text):
    """[(title, field), ...] from "ID=id, Memory (GB)=memory_gb"."""
    return [tuple(part.strip().rpartition("=")[::2]) for part in text.split(",")]


def show_list(args, key, noun, columns_text, records, place="", without=()):
    """Print records as JSON {key: [...]}, or as a table with heading and total."""
    records = list(records)
    if args.format == "json":
        print_json({key: records})
        return
    where = f" for {place}" if place else ""
    if not records:
        print(f"No {plural(2, noun)[2:]} found{where}.")
        return
    shown = [pair for pair in split_columns(columns_text) if pair[0].lower() not in without]
    rows = [[cell(record, name) for _, name in shown] for record in records]
    heading = plural(2, noun)[2:]
    print(f"{heading[0].upper()}{heading[1:]}{where}:")
    print("\n".join(table_lines([title for title, _ in shown], rows)))
    print(f"\nTotal: {plural(len(records), noun)}")


def show_record(args, record):
    """Print one record as JSON, or a line for each of its fields."""
    if args.format == "json":
        print_json(record)
        return
    width = max(map(len, record), default=0)
    for name in record:
        print(f"{name + ':':<{width + 1}} {cell(record, name)}")


def say(args, sentence, **values):
    """Print what a command did: a sentence, or its values as JSON."""
    if args.format == "json":
        print_json(values)
    else:
        print(sentence)


def tell(args, sentence, level="info"):
    """Say something about the way things go, on stderr."""
    if LOG_LEVELS.index(level) <= LOG_LEVELS.index(args.log_level):
        print(f"torc: {clean(sentence)}", file=sys.stderr, flush=True)


# ---- asking

def can_ask():
    """Whether somebody sits at the terminal."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def ask(question):
    """A line typed as the answer to a question on stderr."""
    print(question, end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def confirm(question, sure, option="--force", strict=True):
    """Go on only after a yes, or if the user was sure from the start.

    strict: where nobody can be asked, demand `option`. Raises UsageError, TorcError.
    """
    if sure:
        return
    if can_ask():
        if ask(f"{question} [y/N]").lower() not in ("y", "yes"):
            raise TorcError("nothing was changed")
    elif strict:
        raise UsageError(f"{question} Nobody can be asked here: take {option}")


WORKFLOW_COLUMNS = ("ID=id, Name=name, Description=description, Project=project,"
                    " Metadata=metadata, Timestamp=timestamp")


def choose_workflow(args, client):
    """The id of the user's only non-archived workflow, or of the one that is picked."""
    found = client.page("/workflows", user=client.user, is_archived=False, limit=50,
                        sort_by="id", reverse_sort=True)["items"]
    if not found:
        raise TorcError(f"{client.user} has no workflow in {client.where}: torc create SPEC or "
                        "torc run SPEC makes one")
    if len(found) == 1:
        tell(args, f'workflow {found[0]["id"]} "{found[0]["name"]}"')
        return found[0]["id"]
    lines = table_lines(["ID", "Name", "Description", "Created"], [
        [cell(workflow, name) for name in ("id", "name", "description", "timestamp")]
        for workflow in found])
    listed = "\n".join(lines)
    if not can_ask():
        raise UsageError(f"which workflow? Name its id:\n{listed}")
    print(listed, file=sys.stderr)
    answer = ask("Which workflow (ID)?")
    if answer not in {str(workflow["id"]) for workflow in found}:
        raise TorcError(f"{answer!r} is none of these workflows")
    return int(answer)


# ---- initialize and reinitialize

HAS_RUN = ("completed", "failed", "canceled", "terminated", "pending_failed")
BAD_ENDS = ("failed", "canceled", "terminated", "pending_failed")
MTIME_TOLERANCE_S = 0.01
NAMED_AT_MOST = 10


def present_time(path):
    """st_mtime of a file, None if there is no such file."""
    try:
        return os.stat(path).st_mtime
    except (OSError, ValueError):
        return None


def same_time(stored, present):
    """Whether two file times, either of which may be None, mean the same state."""
    if stored is None or present is None:
        return stored is present
    return abs(stored - present) <= MTIME_TOLERANCE_S


def check_idle(client, workflow_id, force):
    """Raise unless the workflow may be reset; returns its counts. Nothing is changed."""
    counted = client.get(f"/workflows/{workflow_id}/counts")
    if counted["is_archived"]:
        raise Invalid(f"workflow {workflow_id} is archived: torc workflows archive false "
                      f"{workflow_id} brings it back")
    busy = counted["pending"] + counted["running"]
    scheduled = client.get(f"/workflows/{workflow_id}/unfinished")["scheduled"]
    if (busy or scheduled) and not force:
        raise Invalid(f"workflow {workflow_id} is at work ({plural(busy, 'job')} pending or "
                      f"running, {plural(scheduled, 'allocation')} scheduled), so nothing was "
                      f"changed: torc cancel {workflow_id} first, torc run {workflow_id} if its "
                      "runner has died, or take --force")
    return counted


def raise_run(client, workflow_id):
    """Begin another run of a workflow; returns its run_id."""
    status = client.get(f"/workflows/{workflow_id}/status")
    status["run_id"] += 1
    client.put(f"/workflows/{workflow_id}/status", status)
    return status["run_id"]


def store_file_times(client, changed):
    """Remember the present st_mtime of files: [(file record, st_mtime or None), ...]."""
    for file, present in changed:
        client.put(f"/files/{file['id']}", {} if present is None else {"st_mtime": present})


def named(texts):
    """Some texts in quotes, and how many more there are."""
    quoted = ", ".join(f'"{text}"' for text in texts[:NAMED_AT_MOST])
    more = len(texts) - NAMED_AT_MOST
    return quoted + (f" and {more} more" if more > 0 else "")


def refuse_missing(workflow_id, files, user_data=()):
    """Raise TorcError for inputs that do not exist and that no job makes."""
    missing = [f"input {what} missing: {named(texts)}" for what, texts in
               (("files", files), ("user data", user_data)) if texts]
    if missing:
        raise TorcError(f"workflow {workflow_id}: {'; '.join(missing)}. No job makes them: create "
                        f"them, or torc workflows init {workflow_id} --force goes on without")


def required_files(client, workflow_id, counted):
    """Records of the files that jobs read and none writes."""
    wanted = set(client.get(f"/workflows/{workflow_id}/required_existing_files")["files"])
    if wanted and counted["completed"]:   # then outputs of completed jobs are among them
        wanted -= {file["id"] for file in client.items("/files", workflow_id=workflow_id,
                                                       is_output=True)}
    return [file for file in client.items("/files", workflow_id=workflow_id)
            if file["id"] in wanted] if wanted else []


def required_user_data(client, workflow_id, counted):
    """Names of user data without a value that jobs read and none writes."""
    missing = set(client.get(f"/workflows/{workflow_id}/missing_user_data")["user_data"])
    if missing and counted["completed"]:
        missing -= {row["user_data_id"] for row in client.items(
            f"/workflows/{workflow_id}/job_user_data_relationships") if "producer_job_id" in row}
    return [record["name"] for record in client.items("/user_data", workflow_id=workflow_id)
            if record["id"] in missing] if missing else []


def initialize_workflow(client, workflow_id, force=False, dry_run=False):
    """Start a workflow from the beginning: all jobs blocked or ready, the next run_id.

    Returns {"workflow_id", "safe", "missing_input_files", ...}; a dry run does no more. Raises
    TorcError when inputs are missing, Invalid when it is at work; both only without force.
    """
    counted = check_idle(client, workflow_id, force)
    times = [(file, present_time(file["path"]))
             for file in required_files(client, workflow_id, counted)]
    missing = [file["path"] for file, present in times if present is None]
    missing_data = required_user_data(client, workflow_id, counted)
    report = {"workflow_id": workflow_id, "safe": not missing and not missing_data,
              "missing_input_files": missing, "missing_input_file_count": len(missing),
              "missing_user_data": missing_data}
    if dry_run:
        existing = [file["path"] for file in client.items(
            "/files", workflow_id=workflow_id, is_output=True)
            if present_time(file["path"]) is not None]
        return {**report, "existing_output_files": existing,
                "existing_output_file_count": len(existing)}
    if not force:
        refuse_missing(workflow_id, missing, missing_data)
    client.post(f"/workflows/{workflow_id}/reset_status", force=force)
    if counted["total"] > counted["uninitialized"] + counted["disabled"]:
        client.post(f"/workflows/{workflow_id}/reset_job_status")
    raise_run(client, workflow_id)
    store_file_times(client, [(file, present) for file, present in times
                              if not same_time(file.get("st_mtime"), present)])
    client.post(f"/workflows/{workflow_id}/initialize_jobs")
    return report


class Rerun(NamedTuple):
    """What a reinitialization will do, found out without changing anything."""

    jobs: list                            # those that have run and run again, with the reason
    roots: list                           # ids to reset one by one; the server resets the rest
    everything: bool                      # whether all that has run runs again
    changed_inputs: bool                  # whether the server knows of changed inputs
    times: list                           # (file record, st_mtime now) of changed files
    missing: list                         # paths of files that must exist first
    waiting: int                          # jobs that are uninitialized anyway


class Graph:
    """A workflow's jobs with their dependents and files, read by a few requests."""

    def __init__(self, client, workflow_id):
        self.jobs = {job["id"]: job for job in client.items("/jobs", workflow_id=workflow_id)}
        self.dependents, self.producers, self.consumers = {}, {}, {}
        for row in client.items(f"/workflows/{workflow_id}/job_dependencies"):
            self.dependents.setdefault(row["depends_on_job_id"], []).append(row["job_id"])
        self.files = list(client.items("/files", workflow_id=workflow_id))
        if self.files:
            path = f"/workflows/{workflow_id}/job_file_relationships"
            for row in client.items(path):
                for role, jobs in (("producer_job_id", self.producers),
                                   ("consumer_job_id", self.consumers)):
                    if role in row:
                        jobs.setdefault(row["file_id"], set()).add(row[role])
        self.reasons = {}                 # job id: why it runs again

    def ran(self, job_id):
        """Whether a job has run, so that running it is running it again."""
        return self.jobs[job_id]["status"] in HAS_RUN

    def mark(self, job_ids, reason):
        """These jobs run again, if they have run."""
        for job_id in sorted(job_ids):
            if self.ran(job_id):
                self.reasons.setdefault(job_id, reason)

    def mark_files(self):
        """Mark readers of changed files and writers of missing ones; the changed files' times."""
        changed = []
        for file in self.files:
            stored, present = file.get("st_mtime"), present_time(file["path"])
            writers = self.producers.get(file["id"], ())
            done = [job_id for job_id in writers if self.jobs[job_id]["status"] == "completed"]
            if writers and present is None:
                self.mark(done, f'its output file "{file["path"]}" is missing')
            elif same_time(stored, present) or (writers and (stored is None or not done)):
                continue
            else:
                word = "appeared" if stored is None else \
                    "vanished" if present is None else "changed"
                self.mark(self.consumers.get(file["id"], ()),
                          f'its input file "{file["path"]}" {word}')
                changed.append((file, present))
        return changed

    def spread(self):
        """Mark everything downstream; returns the ids reached from some other job."""
        reached = set()
        queue = [*self.reasons, *(job_id for job_id, job in self.jobs.items()
                                  if job["status"] == "uninitialized")]
        for job_id in queue:              # it grows while it is read
            for below in self.dependents.get(job_id, ()):
                if below not in reached:
                    reached.add(below)
                    queue.append(below)
                    again = "runs again" if self.ran(job_id) else "has yet to run"
                    self.mark([below], f'it depends on "{self.jobs[job_id]["name"]}", which '
                                       f"{again}")
        return reached

    def missing(self):
        """Paths of files that nobody makes, do not exist, and are read by a job that will run."""
        return [file["path"] for file in self.files if file["id"] not in self.producers
                and any(self.jobs[job_id]["status"] != "completed" or job_id in self.reasons
                        for job_id in self.consumers.get(file["id"], ()))
                and present_time(file["path"]) is None]


def plan_rerun(client, workflow_id, reset="", with_changes=True):
    """Which jobs run again and why, as a Rerun; nothing is changed.

    reset: "", "failed" (jobs that ended badly are reset) or "all". with_changes: look at files and
    inputs too.
    """
    graph = Graph(client, workflow_id)
    if reset == "all":
        graph.mark(graph.jobs, "all jobs are reset")
    for status in BAD_ENDS if reset == "failed" else ("terminated", "pending_failed"):
        word = "was " + status if status in ("canceled", "terminated") else "failed"
        if reset or with_changes:
            graph.mark([job_id for job_id, job in graph.jobs.items()
                        if job["status"] == status], f"it {word}")
    by_request = set(graph.reasons) if reset else set()
    times, names = [], set()
    if with_changes:
        times = graph.mark_files()
        names = set(client.post(f"/workflows/{workflow_id}/process_changed_job_inputs",
                                dry_run=True)["reinitialized_jobs"])
        graph.mark([job_id for job_id, job in graph.jobs.items() if job["name"] in names],
                   "its command, dependencies or user data changed")
    direct = set(graph.reasons)
    reached = graph.spread()
    jobs = [{"job_id": job_id, "job_name": graph.jobs[job_id]["name"],
             "status": graph.jobs[job_id]["status"], "reason": reason}
            for job_id, reason in sorted(graph.reasons.items())]
    waiting = sum(job["status"] == "uninitialized" for job in graph.jobs.values())
    everything = all(job_id in graph.reasons or job["status"] in ("uninitialized", "blocked",
                                                                  "ready")
                     for job_id, job in graph.jobs.items())
    return Rerun(jobs, sorted(direct - reached - by_request), everything, bool(names), times,
                 graph.missing() if with_changes else [], waiting)


def reinitialize_workflow(client, workflow_id, force=False, dry_run=False, reset=""):
    """Run again what changed: readers of changed files, writers of missing ones, jobs whose inputs
    differ, and everything downstream of them.

    reset: "failed" or "all" resets those jobs first. Returns a Rerun; a dry run does no more.
    Raises TorcError when inputs are missing, Invalid when it is at work; both only without force.
    """
    check_idle(client, workflow_id, force)
    plan = plan_rerun(client, workflow_id, reset)
    if dry_run:
        return plan
    if not force:
        refuse_missing(workflow_id, plan.missing)
    client.post(f"/workflows/{workflow_id}/reset_status", force=force)
    if not plan.jobs and not plan.waiting:
        return plan
    run_id = raise_run(client, workflow_id)
    if reset or (plan.roots and plan.everything):
        client.post(f"/workflows/{workflow_id}/reset_job_status",
                    failed_only=reset == "failed" and not plan.everything)
    if not plan.everything:
        for job_id in plan.roots:
            client.put(f"/jobs/{job_id}/manage_status_change/uninitialized/{run_id}")
    if plan.changed_inputs:
        client.post(f"/workflows/{workflow_id}/process_changed_job_inputs")
    store_file_times(client, plan.times)
    client.post(f"/workflows/{workflow_id}/initialize_jobs", only_uninitialized=True)
    return plan


def show_rerun(args, plan, done):
    """Print what runs again, and why."""
    if args.format == "json":
        print_json({"workflow_id": args.workflow_id, "dry_run": args.dry_run, "jobs": plan.jobs,
                    "job_count": len(plan.jobs), "missing_input_files": plan.missing})
    elif args.dry_run:
        show_list(args, "jobs", "job", "Job ID=job_id, Name=job_name, Status=status, Why=reason",
                  plan.jobs, f"workflow {args.workflow_id} that would run again")
        if plan.waiting:
            print(f"{plural(plan.waiting, 'job')} would run for the first time.")
        if plan.missing:
            print(f"Missing input files: {named(plan.missing)}")
    else:
        print(done)
    return 1 if args.dry_run and plan.missing else 0


# ---- life of a workflow

SPEC_ENDINGS = (".yaml", ".yml", ".json", ".json5", ".kdl")
SPEC_OPTIONS = (
    opt("--example", metavar="NAME", help="a built-in specification: torc examples lists them"),
    opt("--no-resource-monitoring", action="store_true", help="do not measure memory and CPU use"),
    opt("--skip-checks", action="store_true", help="leave out checks that are not needed to run"),
)


def load_spec(args, path):
    """The Spec that the command line names: a file, - for stdin, or a built-in example."""
    if args.example and path:
        raise UsageError(f"{path} and --example exclude each other: name one of them")
    if args.example:
        if args.example not in SPEC_EXAMPLES:
            raise UsageError(f"no example {args.example!r}{nearest(args.example, SPEC_EXAMPLES)}: "
                             "torc examples lists them")
        spec = read_spec(f"{args.example}.json", SPEC_EXAMPLES[args.example])
    elif not path:
        raise UsageError("name a specification file, or --example hello")
    elif path == "-":
        spec = read_spec("-", sys.stdin.read(), skip_checks=args.skip_checks)
    else:
        spec = read_spec(path, skip_checks=args.skip_checks)
    workflow = spec.payload["workflow"]
    if args.no_resource_monitoring:
        monitor = json.loads(workflow.get("resource_monitor_config") or "{}")
        workflow["resource_monitor_config"] = compact({**monitor, "enabled": False})
    return spec


def create_workflow_from(args, client, spec):
    """Create the workflow of a Spec and say so; returns its id."""
    payload = {**spec.payload, "workflow": {**spec.payload["workflow"], "user": client.user}}
    for warning in spec.warnings:
        tell(args, f"warning: {warning}", "warn")
    made = client.post("/workflow_specs", payload)
    tell(args, f'created workflow {made["id"]} "{made["name"]}" ({plural(made["jobs"], "job")})')
    return made["id"]


SUMMARY_LINES = (("Jobs", "job_count"), ("Files", "file_count"),
                 ("User data records", "user_data_count"),
                 ("Resource requirements", "resource_requirements_count"),
                 ("Slurm schedulers", "slurm_scheduler_count"),
                 ("Workflow actions", "action_count"))


def check_spec(args):
    """Print what a specification would make; exit code 1 if it is wrong."""
    errors, warnings, summary = [], [], {}
    try:
        spec = load_spec(args, args.file)
        warnings, summary = spec.warnings, spec.summary
    except SpecError as error:
        errors = error.errors
    if args.format == "json":
        print_json({"valid": not errors, "errors": errors, "warnings": warnings,
                    "summary": summary})
        return 1 if errors else 0
    print(f"Workflow: {summary.get('workflow_name', args.file or args.example)}")
    for title, name in SUMMARY_LINES:
        before = summary.get(name + "_before_expansion", summary.get(name))
        if name in summary:
            more = f" (expanded from {before})" if before != summary[name] else ""
            print(f"  {title}: {summary[name]}{more}")
    if summary:
        print("Submission: " + ("ready for the scheduler" if summary.get(
            "has_schedule_nodes_action") else "local only (no schedule_nodes action)"))
    for title, texts in (("Errors", errors), ("Warnings", warnings)):
        if texts:
            print("\n  ".join([f"{title}:", *texts]))
    print(f"Validation: {'FAILED' if errors else 'PASSED'}")
    return 1 if errors else 0


@command("create", opt("file", nargs="?", metavar="FILE", help="specification, - for stdin"),
         *SPEC_OPTIONS, opt("--dry-run", action="store_true",
                            help="only check; needs neither server nor database"),
         client=False, example="torc create workflow.yaml --dry-run")
def do_create(args, client):
    """Create a workflow from a specification; torc run starts it."""
    if args.dry_run:
        return check_spec(args)
    spec = load_spec(args, args.file)
    client = open_client(args, make=True)
    try:
        workflow_id = create_workflow_from(args, client, spec)
    finally:
        client.close()
    say(args, f"Created workflow {workflow_id}", workflow_id=workflow_id, status="success",
        message=f"Created workflow {workflow_id}")


def settle_dead(args, client, workflow_id):
    """Clean up behind runners of this host and allocations of this cluster that have ended."""
    import shutil
    said = release_dead_nodes(client, workflow_id, args.output_dir)
    if shutil.which("squeue"):
        try:
            said += settle_allocations(client, workflow_id)
        except TorcError as error:
            said.append(f"allocations were not looked at: {error}")
    for sentence in said:
        tell(args, sentence)
    return said


def missing_inputs(payload):
    """Paths of files that jobs of a payload read, none writes, and that do not exist."""
    read, written = set(), set()
    for job in payload["jobs"]:
        read.update(job.get("input_files", ()))
        written.update(job.get("output_files", ()))
    paths = [payload["files"][index]["path"] for index in sorted(read - written)]
    return [path for path in paths if present_time(path) is None]


def workflow_to_run(args, client, spec):
    """Id of the workflow that `run` runs, initialized if it never was."""
    if spec:
        missing = missing_inputs(spec.payload)
        if missing:
            raise TorcError(f"input files missing: {named(missing)}. No job makes them, so no "
                            "workflow was created")
        workflow_id = create_workflow_from(args, client, spec)
    else:
        workflow_id = int(args.spec)
        owner = client.get(f"/workflows/{workflow_id}")["user"]
        confirm(f"Workflow {workflow_id} belongs to {owner}; its commands would run as you, "
                f"{client.user}. Run them?", owner in (client.user, *(args.allow_owner or ())),
                f"--allow-owner {owner}")
        settle_dead(args, client, workflow_id)
    if client.get(f"/workflows/{workflow_id}/status")["is_canceled"]:
        raise TorcError(f"workflow {workflow_id} is canceled: torc workflows reset-status "
                        f"{workflow_id} --failed-only --reinitialize starts it again")
    if client.get(f"/workflows/{workflow_id}/is_uninitialized")["is_uninitialized"]:
        initialize_workflow(client, workflow_id)
    return workflow_id


def names_workflow(args):
    """Whether `run` is given a workflow id, not a specification. Raises UsageError for neither."""
    text = args.spec
    if args.example or not text or text == "-" or os.path.exists(text):
        return False
    if not text.endswith(SPEC_ENDINGS) and not re.fullmatch(r"\d{1,18}", text):
        raise UsageError(f"{text!r} is neither a specification file nor a workflow id")
    return text.isdigit()


@command("run", opt("spec", nargs="?", metavar="SPEC|ID", help="specification, or id of a "
                    "workflow that exists"), *SPEC_OPTIONS,
         opt("--max-parallel-jobs", type=POSITIVE, metavar="N", help="run so many at a time, "
             "whatever they need"),
         opt("--num-cpus", type=POSITIVE, metavar="N", help="default: those of this machine"),
         opt("--memory-gb", type=bounded(float, 0, "a number from 0 on"), metavar="GB"),
         opt("--num-gpus", type=COUNT, metavar="N"), OUTPUT_DIR,
         opt("--time-limit", type=readable(parse_duration), metavar="DURATION",
             help="as in PT2H: jobs that still run then are terminated"),
         opt("--end-time", type=readable(parse_moment), metavar="TIME",
             help="as in 2026-01-02T03:04:05Z; counts before --time-limit"),
         opt("--allow-owner", action="append", metavar="NAME", help="run workflows of this user "
             "too, whose commands then run as you; may be repeated"),
         WORKER_URL, POLL, client=False, example="torc run workflow.yaml --num-cpus 4")
def do_run(args, client):
    """Run a specification, or a workflow that exists, on this machine."""
    spec = None if names_workflow(args) else load_spec(args, args.spec)
    os.makedirs(args.output_dir, exist_ok=True)          # before there is a workflow
    client = open_client(args, make=spec is not None)
    try:
        workflow_id = workflow_to_run(args, client, spec)
        if not spec and client.get(f"/workflows/{workflow_id}/is_complete")["is_complete"]:
            tell(args, f"all jobs of workflow {workflow_id} have ended before: `torc workflows "
                 f"reset-status {workflow_id} --failed-only --reinitialize` readies those that "
                 f"failed, `torc workflows init {workflow_id}` all")
        end_time = args.end_time
        if end_time is None and args.time_limit is not None:
            end_time = time.time() + args.time_limit
        code = Runner(client, workflow_id, RunOptions(
            output_dir=args.output_dir, max_parallel_jobs=args.max_parallel_jobs,
            num_cpus=args.num_cpus, memory_gb=args.memory_gb, num_gpus=args.num_gpus,
            end_time=end_time, schedule=scheduling(
                client, workflow_id, lambda: worker_request(args, client)))).run()
        if args.format == "json":
            print_json({**workflow_report(client, workflow_id), "exit_code": code})
        return code
    finally:
        client.close()


@command("examples", opt("name", nargs="?", metavar="NAME"), client=False,
         example="torc examples hello > hello.json")
def do_examples(args, client):
    """List the built-in specifications, or print one."""
    if args.name is None:
        records = [{"name": name, "description": json.loads(text).get("description", "")}
                   for name, text in SPEC_EXAMPLES.items()]
        show_list(args, "examples", "example", "Name=name, Description=description", records)
    elif args.name in SPEC_EXAMPLES:
        print(SPEC_EXAMPLES[args.name].strip())
    else:
        raise UsageError(f"no example {args.name!r}{nearest(args.name, SPEC_EXAMPLES)}")


def run_times(results):
    """(sum of run times, time from first start to last end) in seconds; None without results."""
    total, first, last = 0.0, None, None
    for result in results:
        seconds = max(0.0, result["exec_time_minutes"] * 60)
        total += seconds
        with contextlib.suppress(ValueError):
            end = parse_moment(result["completion_time"])
            first = end - seconds if first is None else min(first, end - seconds)
            last = end if last is None else max(last, end)
    return (None, None) if first is None else (total, last - first)


def count_records(client, path, **query):
    """How many records a list has."""
    return client.page(path, limit=1, **query)["total_count"]


def workflow_report(client, workflow_id):
    """What `torc status` tells, as its JSON."""
    workflow = client.get(f"/workflows/{workflow_id}")
    counted = client.get(f"/workflows/{workflow_id}/counts")
    total, wall = run_times(client.items("/results", workflow_id=workflow_id))
    active = list(client.items("/compute_nodes", workflow_id=workflow_id, is_active=True))
    nodes = {name: count_records(client, "/scheduled_compute_nodes", workflow_id=workflow_id,
                                 status=name) for name in ("active", "pending")}
    return {"workflow_id": workflow_id, "workflow_name": workflow["name"],
            "workflow_user": workflow["user"], "total_jobs": counted["total"],
            "jobs_by_status": {name: counted[name] for name in STATUS_NAMES},
            "total_exec_time_minutes": (total or 0.0) / 60,
            "total_exec_time_formatted": format_duration(total or 0.0),
            "walltime_seconds": wall or 0.0, "walltime_formatted": format_duration(wall or 0.0),
            "dead_runners": [node["pid"] for node in active if is_dead_here(node)],
            "active_compute_nodes": len(active),
            "active_scheduled_nodes": nodes["active"], "pending_scheduled_nodes": nodes["pending"],
            "is_complete": counted["is_complete"], "is_canceled": counted["is_canceled"]}


def verdict(report):
    """How a workflow stands, in a sentence."""
    by_status, workflow_id = report["jobs_by_status"], report["workflow_id"]
    bad = ", ".join(f"{by_status[name]} {name}" for name in BAD_ENDS if by_status[name])
    if report["is_canceled"]:
        return "The workflow is canceled."
    if report["is_complete"]:
        return f"The workflow is complete with failures ({bad})." if bad \
            else "The workflow is complete."
    if report["total_jobs"] == by_status["uninitialized"] + by_status["disabled"]:
        return f"The workflow has not been started: torc run {workflow_id}"
    ending = f" ({bad})" if bad else ""
    if report["active_compute_nodes"] > len(report["dead_runners"]):
        return f"The workflow is in progress{ending}."
    queued = report["active_scheduled_nodes"] + report["pending_scheduled_nodes"]
    if queued:
        return f"The workflow waits for {plural(queued, 'allocation')} of Slurm{ending}."
    new = by_status["uninitialized"]
    return (f"The workflow is not complete{ending}, and no runner is at work: torc run "
            f"{workflow_id}" + (f" (and torc workflows reinit {workflow_id} before, for "
                                f"{plural(new, 'job')} that are not initialized)" if new else ""))


@command("status", WORKFLOW, OUTPUT_DIR, WORKER_URL, example="torc status 3")
def do_status(args, client):
    """Say how a workflow stands: jobs by status, times, runners."""
    look_after(args, client, args.workflow_id)
    report = workflow_report(client, args.workflow_id)
    report["allocations"] = allocation_lines(client, args.workflow_id)
    if args.format == "json":
        print_json(report)
        return
    print(f'Workflow {report["workflow_id"]} "{clean(report["workflow_name"])}" of '
          f'{report["workflow_user"]}: {plural(report["total_jobs"], "job")}')
    for name, number in report["jobs_by_status"].items():
        if number:
            print(f"  {name:<15}{number:>8}")
    if report["walltime_seconds"] or report["total_exec_time_minutes"]:
        print(f"Run time of all jobs: {report['total_exec_time_formatted']}, from first start to "
              f"last end: {report['walltime_formatted']}")
    dead = report["dead_runners"]
    print(f"Active runners: {report['active_compute_nodes'] - len(dead)}" + (
        f" (and {len(dead)} that died: pid {', '.join(map(str, dead))})" if dead else ""))
    if report["active_scheduled_nodes"] or report["pending_scheduled_nodes"]:
        print(f"Allocations: {report['active_scheduled_nodes']} active, "
              f"{report['pending_scheduled_nodes']} pending")
    for line in report["allocations"]:
        print(f"  {clean(line)}")
    print(verdict(report))


def end_code(counted):
    """Exit code for a workflow's end: 0 all completed, 1 some ended badly, 3 some did not end."""
    if counted["is_canceled"] or any(counted[name] for name in BAD_ENDS):
        return 1
    ended = counted["completed"] + counted["disabled"]
    return 0 if ended == counted["total"] else 3


def prospects(client, workflow_id):
    """(why nothing will happen in a workflow by itself, why nothing happens now), else None."""
    left = client.get(f"/workflows/{workflow_id}/unfinished")
    if not any(left["by_status"].get(name) for name in ("ready", "pending", "running")):
        waiting = ", ".join(f'"{job["job_name"]}" (job {job["job_id"]}, {job["status"]})'
                            for job in left["waiting"][:5])
        return (f"workflow {workflow_id} is stuck: it waits for "
                f"{waiting or 'nothing that will happen'}"), None
    if left["scheduled"] or not all(is_dead_here(node) for node in left["active_nodes"]):
        return None, None
    return None, (f"no runner is at work on workflow {workflow_id}: `torc run {workflow_id}` "
                  "starts one; waiting")


@command("wait", WORKFLOW, OUTPUT_DIR, WORKER_URL,
         opt("--timeout", type=bounded(float, 0, "a number of seconds"), metavar="SECONDS"),
         example="torc wait 3 && echo done")
def do_wait(args, client):
    """Wait until a workflow ends.

    Exit code 0: all completed; 1: some failed or were canceled; 3: stuck, or not within --timeout.
    """
    path = f"/workflows/{args.workflow_id}"
    deadline = None if args.timeout is None else time.monotonic() + args.timeout
    news = client.get(f"{path}/changes", since=-1)
    trouble, code, told = None, None, None
    while not news["is_complete"]:
        left = 60.0 if deadline is None else deadline - time.monotonic()
        look_after(args, client, args.workflow_id)
        trouble, hint = prospects(client, args.workflow_id)
        if hint and hint != told:
            tell(args, hint)
        told = hint or told
        if trouble is None and left <= 0:
            trouble = f"workflow {args.workflow_id} has not ended within {args.timeout:g} s"
            code = 3
        if trouble:
            tell(args, trouble, "error")
            break
        asked = time.monotonic()
        news = client.get(f"{path}/changes", since=news["generation"],
                          wait_s=max(1, math.ceil(min(left, 60))))
        if "retry_after_s" in news:       # too many wait already
            time.sleep(min(news["retry_after_s"], left))
        else:                             # a busy workflow has news all the time
            time.sleep(max(0.0, min(0.2 - (time.monotonic() - asked), left)))
    counted = client.get(f"{path}/counts")
    code = code or end_code(counted)
    sentence = ", ".join(f"{counted[name]} {name}" for name in STATUS_NAMES if counted[name])
    say(args, f"Workflow {args.workflow_id}: {sentence or 'no jobs'}",
        workflow_id=args.workflow_id, exit_code=code, **counted)
    return code


@command("cancel", WORKFLOW, DRY_RUN, example="torc cancel 3")
def do_cancel(args, client):
    """Cancel a workflow: nothing more starts, what runs is ended."""
    path = f"/workflows/{args.workflow_id}"
    counted = client.get(f"{path}/counts")
    busy = counted["pending"] + counted["running"]
    if args.dry_run:
        say(args, f"{plural(busy, 'job')} would be ended", workflow_id=args.workflow_id,
            dry_run=True, job_count=busy)
        return
    client.put(f"{path}/cancel")
    canceled, errors = cancel_allocations(client, args.workflow_id)
    for error in errors:
        tell(args, error, "error")
    more = f", and {plural(len(canceled), 'allocation')} of Slurm" if canceled else ""
    say(args, f"Canceled workflow {args.workflow_id} ({plural(busy, 'job')} pending or running)"
        + more, status="partial_success" if errors else "success", workflow_id=args.workflow_id,
        canceled_slurm_jobs=canceled, errors=errors or None)
    return 1 if errors else 0


def cancel_allocations(client, workflow_id):
    """(Slurm jobs that were canceled, errors): scancel for allocations that have not ended."""
    scheduled, _ = live_allocations(client, workflow_id)
    if not scheduled:
        return [], []
    canceled = []
    try:
        queue = ask_queue({record["scheduler_id"] for record in scheduled})
        canceled = sorted(number for number, entry in queue.items() if entry.phase != "over")
        if canceled:
            slurm("scancel", *canceled)
    except TorcError as error:
        return [], [f"the allocations of workflow {workflow_id} were not canceled: {error}"]
    for record in scheduled:              # a worker that is at work closes its own
        if record["status"] == "pending" or record["scheduler_id"] not in canceled:
            client.put(f"/scheduled_compute_nodes/{record['id']}", {"status": "canceled"})
    return canceled, []


def for_each(args, ids, action):
    """(results of action(id), exit code); failures are told one by one."""
    results, code = [], 0
    for record_id in ids:
        try:
            results.append(action(record_id))
        except (NotFound, Forbidden, Invalid, Internal) as error:
            tell(args, str(error), "error")
            code = 1
    return results, code


def flat(lists):
    """The ids of several lists, each once, in order."""
    return list(dict.fromkeys(number for part in lists or () for number in part))


def delete_workflows(args, client):
    """Delete workflows that belong to the user, after a question."""
    def own(workflow_id):
        workflow = client.get(f"/workflows/{workflow_id}")
        if workflow["user"] != client.user:
            raise Forbidden(f"workflow {workflow_id} belongs to {workflow['user']}, not to you "
                            f"({client.user})")
        return workflow

    found, code = for_each(args, flat(args.ids), own)
    names = ", ".join(f'{workflow["id"]} "{clean(workflow["name"])}"' for workflow in found)
    if found and not args.dry_run:
        confirm(f"Delete workflow {names} with all its jobs and results?", args.force)
        found, failed = for_each(args, [workflow["id"] for workflow in found],
                                 lambda number: client.delete(f"/workflows/{number}"))
        code = max(code, failed)
    if args.format == "json":
        print_json(found)
    elif found:
        print(f"{'Would delete' if args.dry_run else 'Deleted'} workflow {names}")
    return code


@command("delete", LIST_IDS, FORCE, DRY_RUN, example="torc delete 3 4 --force")
def do_delete(args, client):
    """Delete workflows with everything that belongs to them."""
    return delete_workflows(args, client)


@command("ping", example="torc ping")
def do_ping(args, client):
    """Say whether the server (or the local database) answers."""
    answer = client.get("/ping")
    say(args, "The local database can be read" if client.is_local else "Server is running",
        **answer)


# ---- output of jobs

STDIO_ENDINGS = {"separate": ("o", "e"), "combined": ("log", "log"), "no_stdout": (None, "e"),
                 "no_stderr": ("o", None), "none": (None, None)}


def stdio_mode(job, workflow):
    """How a job's output is kept: its own setting, else its workflow's, else separate files."""
    for text, key in ((job.get("stdio"), None), (workflow.get("execution_config"), "stdio")):
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            settings = json.loads(text)
            mode = (settings.get(key) if key else settings).get("mode")
            if mode in STDIO_ENDINGS:
                return mode
    return "separate"


def stdio_paths(directory, mode, job, run_id, attempt_id):
    """[path of stdout, path of stderr] of an attempt; None where none is kept."""
    return [ending and os.path.join(directory, stdio_name(job["workflow_id"], job["id"], run_id,
                                                          attempt_id, ending))
            for ending in STDIO_ENDINGS[mode]]


class Attempt(NamedTuple):
    """One attempt of a job, and where its output is."""

    run_id: int
    attempt_id: int
    stdout: str | None
    stderr: str | None
    host: str


def find_attempt(client, job, number):
    """The Attempt of a job with this number, else the latest. Raises NotFound."""
    workflow_id = job["workflow_id"]
    results = [result for result in client.items("/results", workflow_id=workflow_id,
                                                 job_id=job["id"], all_runs=True)
               if number is None or result["attempt_id"] == number]
    results.sort(key=lambda result: (result["run_id"], result["attempt_id"]))
    present = client.get(f"/workflows/{workflow_id}/status")["run_id"]
    if job["status"] == "running" and number in (None, job["attempt_id"]):
        nodes = list(client.items("/compute_nodes", workflow_id=workflow_id, is_active=True))
        run_id, attempt_id = present, job["attempt_id"]
    elif results:
        nodes = for_each_quiet(client, [f"/compute_nodes/{results[-1]['compute_node_id']}"])
        run_id, attempt_id = results[-1]["run_id"], results[-1]["attempt_id"]
    else:
        which = "" if number is None else f" attempt {number} of"
        raise NotFound(f"there is no output of{which} job {job['id']} \"{job['name']}\", which is "
                       f"{job['status']}: torc why {job['id']}")
    mode = stdio_mode(job, client.get(f"/workflows/{workflow_id}"))
    places = [(stdio_paths(node.get("output_dir") or DEFAULT_OUTPUT_DIR, mode, job, run_id,
                           attempt_id), node["hostname"]) for node in nodes]
    places.append((stdio_paths(DEFAULT_OUTPUT_DIR, mode, job, run_id, attempt_id), ""))
    # Several runners may be active: the job's files are where one of them made them.
    paths, host = next((place for place in places
                        if any(path and os.path.exists(path) for path in place[0])), places[0])
    return Attempt(run_id, attempt_id, *paths, host)


def for_each_quiet(client, paths):
    """The records at these paths that still exist."""
    found = []
    for path in paths:
        with contextlib.suppress(NotFound):
            found.append(client.get(path))
    return found


def copy_output(path, position=0):
    """Write a file from a position on to stdout as it is; returns the new position."""
    try:
        with open(path, "rb") as file:
            file.seek(position)
            while True:
                block = file.read(2**16)
                if not block:
                    return position
                position += len(block)
                sys.stdout.write(block.decode("utf-8", "backslashreplace"))
    except FileNotFoundError:
        return position
    finally:
        sys.stdout.flush()


def follow_output(client, job_id, attempt, paths):
    """Copy files as they grow until the attempt has ended."""
    positions = dict.fromkeys(paths, 0)
    asked, running = time.monotonic(), True
    while True:
        before = dict(positions)
        for path in paths:
            positions[path] = copy_output(path, positions[path])
        if positions == before and not running:
            return
        if running and time.monotonic() - asked > 1.0:
            job = client.get(f"/jobs/{job_id}")
            running = job["status"] == "running" and job["attempt_id"] == attempt.attempt_id
            asked = time.monotonic()
        elif running:
            time.sleep(0.2)               # files tell nobody that they have grown


@command("logs", opt("job_id", type=COUNT, metavar="JOB_ID"),
         opt("--follow", action="store_true", help="go on while the job runs"),
         opt("--stdout", action="store_true", help="only stdout"),
         opt("--stderr", action="store_true", help="only stderr"),
         opt("--attempt", type=POSITIVE, metavar="N", help="default: the latest"),
         example="torc logs 17 --stderr")
def do_logs(args, client):
    """Print what a job wrote."""
    job = client.get(f"/jobs/{args.job_id}")
    attempt = find_attempt(client, job, args.attempt)
    both = args.stdout == args.stderr
    paths = list(dict.fromkeys(path for path, wanted in (
        (attempt.stdout, both or args.stdout), (attempt.stderr, both or args.stderr))
        if wanted and path))
    present = [path for path in paths if os.path.exists(path)]
    if args.format == "json":
        print_json({"job_id": job["id"], "job_name": job["name"], "run_id": attempt.run_id,
                    "attempt_id": attempt.attempt_id, "job_stdout": attempt.stdout,
                    "job_stderr": attempt.stderr, "existing": present})
        return 0
    if not paths:
        raise NotFound(f"job {job['id']} keeps no such output (its stdio mode says so)")
    if not present and not args.follow:
        raise NotFound(f"there is no file {paths[0]}: it was deleted after success, or it is on "
                       f"another machine ({attempt.host or 'unknown'}), or the path means another "
                       "directory here")
    if args.follow:
        follow_output(client, job["id"], attempt, paths)
        return 0
    for path in present:
        if len(present) > 1 and os.path.getsize(path):
            print(f"==> {path} <==")
        copy_output(path)
    return 0


@command("why", opt("job_id", type=COUNT, metavar="JOB_ID"), example="torc why 17")
def do_why(args, client):
    """Say why a job is not running, or how it ended."""
    answer = client.get(f"/jobs/{args.job_id}/why")
    tail = ""
    if answer["status"] in ("pending", "running") and "compute_node_id" in answer:
        node = client.get(f"/compute_nodes/{answer['compute_node_id']}")
        if node["is_active"] and is_dead_here(node):
            answer["sentence"] = (f"its runner (pid {node['pid']}) has died: torc run "
                                  f"{node['workflow_id']} runs it again")
    if answer["status"] in ("failed", "terminated", "pending_failed"):
        workflow_id = client.get(f"/jobs/{args.job_id}")["workflow_id"]
        for result in client.items("/results", workflow_id=workflow_id, job_id=args.job_id,
                                   include_stderr=True):
            tail = result.get("stderr_tail") or ""
    if answer["status"] == "ready":
        answer["allocations"] = allocation_lines(
            client, client.get(f"/jobs/{args.job_id}")["workflow_id"])
    if args.format == "json":
        print_json({**answer, "stderr_tail": tail} if tail else answer)
        return
    print(f'Job {answer["job_id"]} "{clean(answer["job_name"])}" is {answer["status"]}: '
          f'{clean(answer["sentence"])}')
    for line in answer.get("allocations", ()):
        print(f"  {clean(line)}")
    if tail.strip():
        print("\n  ".join(["Last lines of stderr:", *map(clean, tail.splitlines()[-20:])]))


# ---- records: the same verbs for every kind

class Noun(NamedTuple):
    """A kind of record as commands show it."""

    word: str                             # as typed; with _ for - the key in JSON
    table: str                            # its row of KINDS
    columns: str                          # title=field, ...
    verbs: str
    create: tuple = ()                    # options whose names are fields
    update: tuple = ()
    filters: tuple = ()                   # options of the list, passed on as they are
    paging: tuple = PAGING
    list_key: str = ""                    # if the word is not it

    @property
    def key(self):
        """The key of its lists in JSON."""
        return self.list_key or self.word.replace("-", "_")

    @property
    def kind(self):
        """Its row of KINDS."""
        return KINDS[self.table]


def dests(options):
    """Names under which argparse keeps the values of options."""
    return [settings.get("dest") or next((flag for flag in flags if flag[:2] == "--"), flags[0])
            .lstrip("-").replace("-", "_") for flags, settings in options]


def given(args, options):
    """{name: value} of the options that have one."""
    values = {name: getattr(args, name) for name in dests(options)}
    return {name: value for name, value in values.items() if value is not None}


def page_query(args, kind=None):
    """The query of the paging options. Raises UsageError for a field there is not."""
    if args.sort_by and kind:
        known = [field.name for field in kind.fields]
        if args.sort_by not in known:
            raise UsageError(f"{plural(2, kind.name)[2:]} have no field {args.sort_by!r}"
                             f"{nearest(args.sort_by, known)}: {', '.join(known)}")
    return {"limit": args.limit, "offset": args.offset, "sort_by": args.sort_by,
            "reverse_sort": args.reverse_sort or None}


def article(noun):
    """The noun with its article, unless it has a plural's form."""
    if noun.endswith(("data", "requirements")):
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def create_verb(noun):
    """Add `NOUN create`."""
    @command(f"{noun.word} create", WORKFLOW, *noun.create,
             summary=f"Create {article(noun.kind.name)}.", example=NOUN_EXAMPLES[noun.word])
    def create(args, client):
        values = given(args, noun.create)
        known = {field.name for field in noun.kind.fields}
        record = client.post(noun.kind.path, {
            "workflow_id": args.workflow_id,
            **{name: value for name, value in values.items() if name in known}},
            **{name: value for name, value in values.items() if name not in known})
        say(args, f"Created {noun.kind.name} {record['id']}", **record)


def list_verb(noun):
    """Add `NOUN list`."""
    @command(f"{noun.word} list", WORKFLOW, *noun.filters, *noun.paging,
             summary=f"List the {plural(2, noun.kind.name)[2:]} of a workflow.",
             example=f"torc {noun.word} list 3")
    def list_all(args, client):
        query = {**given(args, noun.filters), **page_query(args, noun.kind)}
        path = noun.kind.path
        if noun.table == "failure_handler":      # upstream lists them below their workflow
            path = f"/workflows/{args.workflow_id}{path}"
        else:
            query["workflow_id"] = args.workflow_id
        show_list(args, noun.key, noun.kind.name, noun.columns, client.items(path, **query),
                  f"workflow {args.workflow_id}")


def get_verb(noun):
    """Add `NOUN get`."""
    @command(f"{noun.word} get", ID, summary=f"Show {article(noun.kind.name)}.",
             example=f"torc {noun.word} get 17")
    def get(args, client):
        show_record(args, client.get(f"{noun.kind.path}/{args.id}"))


def update_verb(noun):
    """Add `NOUN update`."""
    @command(f"{noun.word} update", ID, *noun.update,
             summary=f"Change {article(noun.kind.name)}; what is not named stays.",
             example=f"torc {noun.word} update 17 {noun.update[0][0][-1]} new")
    def update(args, client):
        values = given(args, noun.update)
        if not values:
            raise UsageError(f"name what to change: see torc {noun.word} update --help")
        path = f"{noun.kind.path}/{args.id}"
        if noun.table == "file":          # this PUT forgets st_mtime unless it is sent
            values = {"st_mtime": client.get(path).get("st_mtime"), **values}
        record = client.put(path, values)
        say(args, f"Updated {noun.kind.name} {args.id}", **record)


DONE = {"delete": "Deleted", "cancel": "Canceled", "terminate": "Terminated",
        "retry": "Will run again:"}


def act_on_ids(args, client, noun, verb, action):
    """Do something to the records named by id, after a dry run or a question; the exit code."""
    ids, name = flat(args.ids), noun.kind.name

    def look(record_id):
        return client.get(f"{noun.kind.path}/{record_id}")

    if not args.dry_run:
        confirm(f"{verb.capitalize()} {name} {', '.join(map(str, ids))}?",
                args.force or args.no_prompts, strict=False)
    found, code = for_each(args, ids, look if args.dry_run else action)
    if args.format == "json":
        print_json(found[0] if len(ids) == 1 and found else {noun.key: found})
        return code
    for record in found:
        label = f' "{clean(record["name"])}"' if "name" in record else ""
        print(f"{'Would ' + verb if args.dry_run else DONE[verb]} {name} {record['id']}{label}")
    return code


def delete_verb(noun):
    """Add `NOUN delete`."""
    @command(f"{noun.word} delete", LIST_IDS, FORCE, NO_PROMPTS, DRY_RUN,
             summary=f"Delete {plural(2, noun.kind.name)[2:]}.",
             example=f"torc {noun.word} delete 17 18")
    def delete(args, client):
        return act_on_ids(args, client, noun, "delete",
                          lambda number: client.delete(f"{noun.kind.path}/{number}"))


def delete_all_verb(noun):
    """Add `NOUN delete-all`."""
    @command(f"{noun.word} delete-all", WORKFLOW, FORCE, NO_PROMPTS, DRY_RUN,
             summary=f"Delete all {plural(2, noun.kind.name)[2:]} of a workflow.",
             example=f"torc {noun.word} delete-all 3 --dry-run")
    def delete_all(args, client):
        number = count_records(client, noun.kind.path, workflow_id=args.workflow_id)
        what = f"{plural(number, noun.kind.name)} of workflow {args.workflow_id}"
        if not args.dry_run:
            confirm(f"Delete {what}?", args.force or args.no_prompts)
            number = client.delete(noun.kind.path, workflow_id=args.workflow_id)["count"]
        say(args, f"{'Would delete' if args.dry_run else 'Deleted'} {what}", count=number,
            workflow_id=args.workflow_id, dry_run=args.dry_run)


NAME = opt("-n", "--name", metavar="NAME", required=True)
NEW_NAME = opt("-n", "--name", metavar="NAME")
REQUIREMENTS = (
    opt("--num-cpus", type=COUNT, metavar="N"), opt("--num-gpus", type=COUNT, metavar="N"),
    opt("--num-nodes", type=POSITIVE, metavar="N"),
    opt("-m", "--memory", type=MEMORY, metavar="SIZE", help="as in 500m or 2g"),
    opt("-r", "--runtime", type=RUNTIME, metavar="DURATION", help="as in PT30M"))
SCHEDULER = (
    opt("-p", "--partition", metavar="NAME"), opt("-q", "--qos", metavar="NAME"),
    opt("-m", "--mem", type=checked_text(slurm_memory), metavar="SIZE", help="of each node, as in "
        "180g"),
    opt("-g", "--gres", metavar="TEXT", help="as in gpu:2"),
    opt("-t", "--tmp", metavar="SIZE", help="local disk"),
    opt("--ntasks-per-node", type=POSITIVE, metavar="N", help="CPUs of each node, on partitions "
        "whose nodes are shared"),
    opt("-e", "--extra", metavar="TEXT", help="further options of sbatch, as in --exclusive"))
NOUNS = (
    Noun("jobs", "job", "ID=id, Name=name, Status=status, Priority=priority, Command=command",
         "get delete delete-all"),
    Noun("files", "file", "ID=id, Name=name, Path=path, Modified Time=st_mtime",
         "create list get update delete",
         create=(NAME, opt("-p", "--path", metavar="PATH", required=True)),
         update=(NEW_NAME, opt("-p", "--path", metavar="PATH")),
         filters=(opt("--produced-by-job-id", type=COUNT, metavar="ID"),)),
    Noun("user-data", "user_data", "ID=id, Name=name, Data=data, Ephemeral=is_ephemeral",
         "create list get update delete delete-all",
         create=(NAME, opt("-d", "--data", type=JSON_VALUE, metavar="JSON"),
                 opt("--ephemeral", dest="is_ephemeral", action="store_true"),
                 opt("--consumer-job-id", type=COUNT, metavar="ID"),
                 opt("--producer-job-id", type=COUNT, metavar="ID")),
         update=(NEW_NAME, opt("-d", "--data", type=JSON_VALUE, metavar="JSON"),
                 opt("--ephemeral", dest="is_ephemeral", type=TRUTH, metavar="true|false")),
         filters=(opt("--name", metavar="TEXT", help="part of the name"),
                  opt("--is-ephemeral", type=TRUTH, metavar="true|false"),
                  opt("--consumer-job-id", type=COUNT, metavar="ID"),
                  opt("--producer-job-id", type=COUNT, metavar="ID")),
         paging=paging(["-o"])),
    Noun("results", "result", "", "get delete"),
    Noun("events", "event", "ID=id, Time=timestamp, Data=data", "create get delete",
         create=(opt("-d", "--data", type=JSON_VALUE, metavar="JSON", required=True),)),
    Noun("resource-requirements", "resource_requirements",
         "ID=id, Name=name, CPUs=num_cpus, GPUs=num_gpus, Nodes=num_nodes, Memory=memory,"
         " Runtime=runtime", "create list get update delete",
         create=(NAME, *REQUIREMENTS), update=(NEW_NAME, *REQUIREMENTS)),
    Noun("failure-handlers", "failure_handler", "ID=id, Name=name, Rules=rules", "list get"),
    Noun("compute-nodes", "compute_node",
         "ID=id, Hostname=hostname, PID=pid, CPUs=num_cpus, Memory (GB)=memory_gb, GPUs=num_gpus,"
         " Active=is_active, Start Time=start_time, Duration=duration_seconds", "list get",
         filters=(opt("--scheduled-compute-node", dest="scheduled_compute_node_id", type=COUNT,
                      metavar="ID"),), paging=SHORT_PAGING),
    Noun("scheduled-compute-nodes", "scheduled_compute_node",
         "ID=id, Scheduler ID=scheduler_id, Config ID=scheduler_config_id, Type=scheduler_type,"
         " Status=status", "list get",
         filters=(opt("--scheduler-id", type=COUNT, metavar="ID"),
                  opt("--scheduler-config-id", type=COUNT, metavar="ID"),
                  opt("--status", metavar="STATUS"))),
    Noun("slurm", "slurm_scheduler",
         "ID=id, Name=name, Account=account, Nodes=nodes, Walltime=walltime, Partition=partition,"
         " QOS=qos, Mem=mem", "create list get update delete", list_key="slurm_schedulers",
         create=(NAME, opt("-a", "--account", metavar="NAME", required=True),
                 opt("-N", "--nodes", type=POSITIVE, default=1, metavar="N"),
                 opt("-W", "--walltime", type=checked_text(parse_walltime), default="04:00:00",
                     metavar="TIME", help="as in 04:00:00 or 1-12:00:00 (default: 04:00:00)"),
                 *SCHEDULER),
         update=(opt("-N", "--name", metavar="NAME"), opt("-a", "--account", metavar="NAME"),
                 opt("-n", "--nodes", type=POSITIVE, metavar="N"),
                 opt("--walltime", type=checked_text(parse_walltime), metavar="TIME"),
                 *SCHEDULER)),
)
NOUN_EXAMPLES = {
    "slurm": "torc slurm create 3 -n small -a myaccount -p short -W 00:30:00",
    "files": "torc files create 3 -n input -p data/input.csv",
    "user-data": "torc user-data create 3 -n config -d '{\"x\": 1}'",
    "events": "torc events create 3 -d '{\"note\": \"started by hand\"}'",
    "resource-requirements": "torc resource-requirements create 3 -n large --num-cpus 8 -m 16g",
}
NOUN_VERBS = {"create": create_verb, "list": list_verb, "get": get_verb, "update": update_verb,
              "delete": delete_verb, "delete-all": delete_all_verb}
NOUN_OF = {noun.word: noun for noun in NOUNS}
for _noun in NOUNS:
    for _verb in _noun.verbs.split():
        NOUN_VERBS[_verb](_noun)


# ---- workflows

@command("workflows new", opt("-n", "--name", metavar="NAME", required=True),
         opt("-d", "--description", metavar="TEXT"), client="make",
         example="torc workflows new -n study")
def do_workflows_new(args, client):
    """Create an empty workflow."""
    body = {"name": args.name, "user": client.user, "description": args.description}
    record = client.post("/workflows", {name: value for name, value in body.items() if value})
    if args.format == "json":
        print_json(record)
    else:
        print(f"Created workflow {record['id']} \"{clean(record['name'])}\" of {record['user']}")


@command("workflows list", *PAGING,
         opt("--archived-only", action="store_true"),
         opt("--include-archived", action="store_true"),
         opt("--all-users", action="store_true"), example="torc workflows list --include-archived")
def do_workflows_list(args, client):
    """List your workflows."""
    archived = True if args.archived_only else None if args.include_archived else False
    records = client.items("/workflows", is_archived=archived,
                           user=None if args.all_users else client.user,
                           **page_query(args, KINDS["workflow"]))
    more = ", User=user" if args.all_users else ""
    show_list(args, "workflows", "workflow", WORKFLOW_COLUMNS + more, records,
              "" if args.all_users else f"user {client.user}")


@command("workflows get", WORKFLOW, example="torc workflows get 3")
def do_workflows_get(args, client):
    """Show a workflow's settings."""
    show_record(args, client.get(f"/workflows/{args.workflow_id}"))


WORKFLOW_FIELDS = (opt("-n", "--name", metavar="NAME"), opt("-d", "--description", metavar="TEXT"),
                   opt("--owner-user", dest="user", metavar="USER"),
                   opt("--project", metavar="TEXT"), opt("--metadata", metavar="JSON"))


@command("workflows update", WORKFLOW, *WORKFLOW_FIELDS,
         example="torc workflows update 3 -d 'second try'")
def do_workflows_update(args, client):
    """Change a workflow's name, description, owner, project or metadata."""
    values = given(args, WORKFLOW_FIELDS)
    if not values:
        raise UsageError("name what to change: see torc workflows update --help")
    record = client.put(f"/workflows/{args.workflow_id}", values)
    say(args, f"Updated workflow {args.workflow_id}", **record)


@command("workflows archive", opt("archived", type=TRUTH, metavar="true|false"),
         opt("ids", nargs="*", type=IDS_TYPE, metavar="ID"),
         example="torc workflows archive true 3")
def do_workflows_archive(args, client):
    """Hide workflows from lists, or bring them back."""
    def archive(workflow_id):
        status = client.get(f"/workflows/{workflow_id}/status")
        return client.put(f"/workflows/{workflow_id}/status",
                          {**status, "is_archived": args.archived})

    ids = flat(args.ids) or [choose_workflow(args, client)]
    found, code = for_each(args, ids, archive)
    if args.format == "json":
        print_json(found)
    for record in found if args.format == "table" else ():
        print(f"Workflow {record['id']} is {'' if args.archived else 'no longer '}archived")
    return code


@command("workflows reset-status", WORKFLOW,
         opt("--failed-only", action="store_true", help="failed, canceled, terminated and "
             "pending_failed jobs, and what depends on them"),
         opt("-r", "--reinitialize", action="store_true", help="and make them ready"),
         opt("--force", action="store_true", help="though jobs run or inputs are missing"),
         NO_PROMPTS, DRY_RUN, example="torc workflows reset-status 3 --failed-only --reinitialize")
def do_workflows_reset_status(args, client):
    """Set jobs back to uninitialized: all, or those that failed."""
    reset, workflow_id = "failed" if args.failed_only else "all", args.workflow_id
    check_idle(client, workflow_id, args.force)
    plan = plan_rerun(client, workflow_id, reset, with_changes=args.reinitialize)
    if not args.dry_run:
        if plan.missing and not args.force:
            refuse_missing(workflow_id, plan.missing)
        confirm(f"Reset {plural(len(plan.jobs), 'job')} of workflow {workflow_id}?",
                args.no_prompts or args.force, "--no-prompts")
        if args.reinitialize:
            plan = reinitialize_workflow(client, workflow_id, args.force, reset=reset)
        else:
            client.post(f"/workflows/{workflow_id}/reset_status", force=args.force)
            client.post(f"/workflows/{workflow_id}/reset_job_status",
                        failed_only=args.failed_only)
    next_step = f"torc run {workflow_id}" if args.reinitialize else \
        f"torc workflows reinit {workflow_id}"
    return show_rerun(args, plan, f"Reset {plural(len(plan.jobs), 'job')} of workflow "
                                  f"{workflow_id}; go on with {next_step}")


@command("workflows init", WORKFLOW,
         opt("--force", action="store_true", help="though inputs are missing or jobs run"),
         NO_PROMPTS, DRY_RUN, example="torc workflows init 3 --dry-run")
def do_workflows_init(args, client):
    """Start a workflow from the beginning: all jobs blocked or ready."""
    workflow_id = args.workflow_id
    if not args.dry_run:
        fresh = client.get(f"/workflows/{workflow_id}/is_uninitialized")["is_uninitialized"]
        confirm(f"Workflow {workflow_id} has been initialized before. Start it from the beginning?",
                fresh or args.force or args.no_prompts, "--no-prompts")
    report = initialize_workflow(client, workflow_id, args.force, args.dry_run)
    if args.format == "json":
        print_json(report if args.dry_run else {**report, "status": "success"})
    elif not args.dry_run:
        print(f"Initialized workflow {workflow_id}")
    else:
        print("Safe to initialize." if report["safe"] else "Not safe to initialize.")
        for title, name in (("Missing input files", "missing_input_files"),
                            ("Missing user data", "missing_user_data"),
                            ("Output files that exist", "existing_output_files")):
            if report[name]:
                print("\n  ".join([f"{title}:", *map(clean, report[name])]))
    return 1 if args.dry_run and not report["safe"] else 0


@command("workflows reinit", WORKFLOW,
         opt("--force", action="store_true", help="though inputs are missing or jobs run"), DRY_RUN,
         example="torc workflows reinit 3 --dry-run")
def do_workflows_reinit(args, client):
    """Run again what changed since: files, commands, user data, and all that depends on them."""
    plan = reinitialize_workflow(client, args.workflow_id, args.force, args.dry_run)
    number = len(plan.jobs) + plan.waiting
    done = f"Reinitialized workflow {args.workflow_id}: {plural(number, 'job')} to run" if number \
        else f"Nothing has changed in workflow {args.workflow_id}: no job runs again"
    return show_rerun(args, plan, done)


@command("workflows list-actions", WORKFLOW, example="torc workflows list-actions 3")
def do_workflows_list_actions(args, client):
    """List a workflow's actions and how far they are."""
    records = client.get(f"/workflows/{args.workflow_id}/actions")
    if args.format == "table":
        for action in records:
            triggered = action["trigger_count"] >= action["required_triggers"]
            action["progress"] = f"{action['trigger_count']}/{action['required_triggers']}"
            action["status"] = "Executed" if action["executed"] else \
                "Pending" if triggered else "Waiting"
    show_list(args, "actions", "action", "ID=id, Trigger=trigger_type, Action=action_type,"
              " Progress=progress, Status=status, Executed At=executed_at, Job IDs=job_ids",
              records, f"workflow {args.workflow_id}")


@command("workflows is-complete", WORKFLOW, example="torc workflows is-complete 3")
def do_workflows_is_complete(args, client):
    """Say whether a workflow is complete; the exit code is 0 in any case (see torc wait)."""
    answer = client.get(f"/workflows/{args.workflow_id}/is_complete")
    state = "canceled" if answer["is_canceled"] else \
        "complete" if answer["is_complete"] else "not complete"
    say(args, f"Workflow {args.workflow_id} is {state}", **answer)


for _name in ("create", "run", "status", "cancel", "delete"):     # where older releases had them
    COMMANDS[f"workflows {_name}"] = COMMANDS[_name]._replace(
        name=f"workflows {_name}", example=COMMANDS[_name].example.replace("torc ",
                                                                           "torc workflows ", 1))


# ---- jobs

JOB_IDS = {"nargs": "+", "action": "append", "type": IDS_TYPE, "metavar": "ID"}


@command("jobs create", WORKFLOW, opt("-n", "--name", metavar="NAME", required=True),
         opt("-c", "--command", metavar="COMMAND", required=True),
         opt("-r", "--resource-requirements-id", type=COUNT, metavar="ID"),
         opt("--priority", type=COUNT, metavar="N"),
         opt("-b", "--blocking-job-ids", dest="depends_on_job_ids", **JOB_IDS),
         opt("-i", "--input-file-ids", **JOB_IDS), opt("-o", "--output-file-ids", **JOB_IDS),
         example="torc jobs create 3 -n post -c 'python post.py' -b 17,18")
def do_jobs_create(args, client):
    """Create a job in a workflow that is not initialized."""
    body = {"workflow_id": args.workflow_id, "name": args.name, "command": args.command}
    for name in ("resource_requirements_id", "priority"):
        if getattr(args, name) is not None:
            body[name] = getattr(args, name)
    for name in ("depends_on_job_ids", "input_file_ids", "output_file_ids"):
        if getattr(args, name):
            body[name] = flat(part for parts in getattr(args, name) for part in parts)
    record = client.post("/jobs", body)
    say(args, f"Created job {record['id']}", **record)


def read_commands(path):
    """The commands in a file: lines that are neither empty nor comments. Raises TorcError."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError:
        raise TorcError(f"{path} is not UTF-8 text") from None
    commands = [line for line in lines if line and not line.startswith("#")]
    if not commands:
        raise TorcError(f"{path} holds no commands")
    return commands


@command("jobs create-from-file", opt("workflow_id", type=COUNT, metavar="WORKFLOW_ID"),
         opt("file", metavar="FILE"),
         opt("--cpus-per-job", type=POSITIVE, default=1, metavar="N"),
         opt("--memory-per-job", type=MEMORY, default="1m", metavar="SIZE"),
         opt("--runtime-per-job", type=RUNTIME, default="PT1M", metavar="DURATION"),
         example="torc jobs create-from-file 3 commands.txt --memory-per-job 2g")
def do_jobs_create_from_file(args, client):
    """Create a job for each line of a file."""
    workflow_id, commands = args.workflow_id, read_commands(args.file)
    numbers = [int(job["name"][3:]) for job in client.items("/jobs", workflow_id=workflow_id)
               if re.fullmatch(r"job\d{1,9}", job["name"])]
    first = max(numbers, default=0) + 1
    needs = client.post("/resource_requirements", {
        "workflow_id": workflow_id, "name": f"batch_jobs_req_{int(time.time())}",
        "num_cpus": args.cpus_per_job, "memory": args.memory_per_job,
        "runtime": args.runtime_per_job})["id"]
    jobs = [{"workflow_id": workflow_id, "name": f"job{number}", "command": text,
             "resource_requirements_id": needs} for number, text in enumerate(commands, first)]
    made = []
    for start in range(0, len(jobs), MAX_LIMIT):
        made += client.post("/bulk_jobs", {"jobs": jobs[start:start + MAX_LIMIT]})["jobs"]
    say(args, f"Created {plural(len(made), 'job')} in workflow {workflow_id}",
        workflow_id=workflow_id, jobs_created=len(made), job_ids=[job["id"] for job in made])


@command("jobs list", WORKFLOW,
         opt("-s", "--status", choices=STATUS_NAMES, metavar="STATUS"),
         opt("--upstream-job-id", type=COUNT, metavar="ID", help="jobs that depend on this one"),
         *PAGING, opt("--include-relationships", action="store_true",
                      help="with the ids of dependencies, files and user data"),
         opt("-x", "--exclude", action="append", default=[], metavar="COLUMN",
             help="leave a column out of the table"), example="torc jobs list 3 --status failed")
def do_jobs_list(args, client):
    """List the jobs of a workflow."""
    titles = [title.lower() for title, _ in split_columns(NOUN_OF["jobs"].columns)]
    for column in args.exclude:
        if column.lower() not in titles:
            raise UsageError(f"the table has no column {column!r}{nearest(column, titles)}")
    relations = ", Depends On=depends_on_job_ids, Input Files=input_file_ids," \
                " Output Files=output_file_ids" if args.include_relationships else ""
    records = client.items("/jobs", workflow_id=args.workflow_id, status=args.status,
                           upstream_job_id=args.upstream_job_id,
                           include_relationships=args.include_relationships or None,
                           **page_query(args, KINDS["job"]))
    show_list(args, "jobs", "job", NOUN_OF["jobs"].columns + relations, records,
              f"workflow {args.workflow_id}", [column.lower() for column in args.exclude])


def own_runtime(client, job, runtime):
    """Id of requirements like the job's with another runtime, which no other job uses."""
    old = client.get(f"/resource_requirements/{job['resource_requirements_id']}")
    name = f"{job['name']}_{job['id']}"
    body = {**old, "name": name, "runtime": runtime}
    if old["name"] == name:
        return client.put(f"/resource_requirements/{old['id']}", body)["id"]
    body.pop("id")
    return client.post("/resource_requirements", body)["id"]


@command("jobs update", ID, opt("-n", "--name", metavar="NAME"),
         opt("-c", "--command", metavar="COMMAND"), opt("--priority", type=COUNT, metavar="N"),
         opt("--resource-requirements-id", type=COUNT, metavar="ID"),
         opt("--runtime", type=RUNTIME, metavar="DURATION", help="of this job alone, as in PT30M"),
         example="torc jobs update 17 --priority 5")
def do_jobs_update(args, client):
    """Change a job; name and command only while it is uninitialized."""
    values = {name: getattr(args, name) for name in ("name", "command", "priority",
                                                     "resource_requirements_id")
              if getattr(args, name) is not None}
    if not values and not args.runtime:
        raise UsageError("name what to change: see torc jobs update --help")
    job = client.put(f"/jobs/{args.id}", values)
    if args.runtime:
        job = client.put(f"/jobs/{args.id}", {
            "resource_requirements_id": own_runtime(client, job, args.runtime)})
    say(args, f"Updated job {args.id}", **job)


def jobs_with(args, client, key, records, columns_text):
    """Print the jobs of a workflow, or one, beside the records that they refer to by `key`."""
    jobs = [client.get(f"/jobs/{args.job_id}")] if args.job_id is not None else \
        client.items("/jobs", workflow_id=args.workflow_id)
    by_id = {record["id"]: record for record in records}
    rows = [{**by_id[job[key]], "id": job[key], "job_id": job["id"], "job_name": job["name"]}
            for job in jobs if job.get(key) in by_id]
    show_list(args, "jobs", "job", columns_text, rows, f"workflow {args.workflow_id}")


JOB_ID = opt("-j", "--job-id", type=COUNT, metavar="ID", help="only this job")


@command("jobs list-resource-requirements", WORKFLOW, JOB_ID,
         example="torc jobs list-resource-requirements 3")
def do_jobs_list_requirements(args, client):
    """List what each job needs."""
    jobs_with(args, client, "resource_requirements_id",
              client.items("/resource_requirements", workflow_id=args.workflow_id),
              "Job ID=job_id, Job Name=job_name, RR ID=id, RR Name=name, CPUs=num_cpus,"
              " GPUs=num_gpus, Nodes=num_nodes, Memory=memory, Runtime=runtime")


@command("jobs list-failure-handlers", WORKFLOW, JOB_ID,
         example="torc jobs list-failure-handlers 3")
def do_jobs_list_handlers(args, client):
    """List the failure handler of each job that has one."""
    jobs_with(args, client, "failure_handler_id",
              client.items(f"/workflows/{args.workflow_id}/failure_handlers"),
              "Job ID=job_id, Job Name=job_name, Handler ID=id, Handler=name, Rules=rules")


def job_verb(verb, summary, path, **query):
    """Add `jobs VERB ID...`, a POST for each job."""
    @command(f"jobs {verb}", LIST_IDS, FORCE, NO_PROMPTS, DRY_RUN, summary=summary,
             example=f"torc jobs {verb} 17 18")
    def act(args, client):
        return act_on_ids(args, client, NOUN_OF["jobs"], verb,
                          lambda number: client.post(f"/jobs/{number}/{path}", **query))


job_verb("cancel", "Cancel jobs: they never start, or are ended; what depends on them is canceled.",
         "stop", status="canceled")
job_verb("terminate", "End jobs as a time limit would.", "stop", status="terminated")
job_verb("retry", "Run jobs again that have ended.", "rerun")


# ---- the lists that differ

@command("files list-required-existing", WORKFLOW, example="torc files list-required-existing 3")
def do_files_list_required(args, client):
    """List the files that must exist: inputs that no job makes, outputs of completed jobs."""
    wanted = set(client.get(f"/workflows/{args.workflow_id}/required_existing_files")["files"])
    show_list(args, "files", "file", NOUN_OF["files"].columns,
              [file for file in client.items("/files", workflow_id=args.workflow_id)
               if file["id"] in wanted], f"workflow {args.workflow_id}")


@command("user-data list-missing", WORKFLOW, example="torc user-data list-missing 3")
def do_user_data_list_missing(args, client):
    """List user data that should have a value and has none."""
    wanted = set(client.get(f"/workflows/{args.workflow_id}/missing_user_data")["user_data"])
    show_list(args, "user_data", "user data", NOUN_OF["user-data"].columns,
              [record for record in client.items("/user_data", workflow_id=args.workflow_id)
               if record["id"] in wanted], f"workflow {args.workflow_id}")


@command("events list", WORKFLOW, opt("-t", "--type", metavar="TYPE", help="category or event_type "
                                      "in the event's data"), *SHORT_PAGING,
         example="torc events list 3 -t user_action")
def do_events_list(args, client):
    """List what happened in a workflow."""
    query = page_query(args, KINDS["event"])
    records = client.items("/events", workflow_id=args.workflow_id,
                           **{**query, "limit": None if args.type else args.limit})
    if args.type:
        records = [event for event in records if isinstance(event["data"], dict) and args.type in (
            event["data"].get("category"), event["data"].get("event_type"))][:args.limit]
    show_list(args, "events", "event", NOUN_OF["events"].columns, records,
              f"workflow {args.workflow_id}")


@command("events get-latest-event", WORKFLOW, example="torc events get-latest-event 3")
def do_events_latest(args, client):
    """Show the latest event of a workflow."""
    found = client.page("/events", workflow_id=args.workflow_id, sort_by="timestamp",
                        reverse_sort=True, limit=1)["items"]
    if not found:
        raise NotFound(f"workflow {args.workflow_id} has no events")
    show_record(args, found[0])


DEPENDENCY_LISTS = (
    ("job-job", "job_dependencies", "dependency", "Which job waits for which.",
     "Job ID=job_id, Job Name=job_name, Waits For ID=depends_on_job_id,"
     " Waits For=depends_on_job_name"),
    ("job-file", "job_file_relationships", "relationship", "Which job writes and reads which file.",
     "File ID=file_id, Name=file_name, Path=file_path, Producer ID=producer_job_id,"
     " Producer=producer_job_name, Consumer ID=consumer_job_id, Consumer=consumer_job_name"),
    ("job-user-data", "job_user_data_relationships", "relationship",
     "Which job writes and reads which user data.",
     "User Data ID=user_data_id, Name=user_data_name, Producer ID=producer_job_id,"
     " Producer=producer_job_name, Consumer ID=consumer_job_id, Consumer=consumer_job_name"),
)


def dependency_list(word, key, noun, summary, columns_text):
    """Add `job-dependencies WORD`."""
    @command(f"job-dependencies {word}", WORKFLOW, *PAGING, summary=summary,
             example=f"torc job-dependencies {word} 3")
    def list_all(args, client):
        show_list(args, key, noun, columns_text, client.items(
            f"/workflows/{args.workflow_id}/{key}", **page_query(args)),
            f"workflow {args.workflow_id}")


for _row in DEPENDENCY_LISTS:
    dependency_list(*_row)


RESULT_COLUMNS_SHOWN = (
    "ID=id, Job ID=job_id, Job Name=job_name, WF ID=workflow_id, Run ID=run_id, Attempt=attempt_id,"
    " Return Code=return_code, Exec Time (min)=exec_time_minutes, Peak Mem=peak_memory_bytes,"
    " Avg CPU %=avg_cpu_percent, Completion Time=completion_time, Status=status")


def find_results(args, client):
    """The results that the options of `results list` ask for."""
    from itertools import islice
    query = page_query(args, KINDS["result"])
    if args.failed:                       # the server cannot filter by "not 0"
        query["limit"] = None
    # A run that is named may have been superseded by a later one.
    found = client.items("/results", workflow_id=args.workflow_id, job_id=args.job_id,
                         run_id=args.run_id, return_code=args.return_code, status=args.status,
                         compute_node_id=args.compute_node,
                         all_runs=args.all_runs or args.run_id is not None, **query)
    if args.failed:
        found = islice((result for result in found if result["return_code"] != 0), args.limit)
    return list(found)


@command("results list", WORKFLOW, JOB_ID, opt("-r", "--run-id", type=COUNT, metavar="N"),
         opt("--return-code", type=int, metavar="N"),
         opt("--failed", action="store_true", help="return code other than 0"),
         opt("-s", "--status", choices=STATUS_NAMES, metavar="STATUS"), *PAGING,
         opt("--all-runs", action="store_true", help="not only each job's latest"),
         opt("--compute-node", type=COUNT, metavar="ID"),
         opt("--include-logs", action="store_true", help="a JSON report with the paths of what the "
             "jobs wrote"),
         opt("-o", "--output-dir", metavar="DIR", help="with --include-logs: where those files are "
             "(default: where each runner put them)"),
         example="torc results list 3 --failed")
def do_results_list(args, client):
    """List the results of jobs: return codes, times, memory."""
    results = find_results(args, client)
    if args.include_logs:
        print_json(log_report(args, client, results))
        return
    if args.format == "table" and results:
        jobs = jobs_of(args, client)
        for result in results:
            result["job_name"] = jobs[result["job_id"]]["name"]
    show_list(args, "results", "result", RESULT_COLUMNS_SHOWN, results,
              f"workflow {args.workflow_id}")


def jobs_of(args, client):
    """{id: job} of the workflow, or only of the job that was named."""
    jobs = client.items("/jobs", workflow_id=args.workflow_id) if args.job_id is None else \
        [client.get(f"/jobs/{args.job_id}")]
    return {job["id"]: job for job in jobs}


def log_report(args, client, results):
    """Results with the paths of what the jobs wrote, as their stdio mode names them."""
    workflow = client.get(f"/workflows/{args.workflow_id}")
    jobs = jobs_of(args, client)
    nodes = {node["id"]: node for node in client.items("/compute_nodes",
                                                       workflow_id=args.workflow_id)}
    rows = []
    for result in results:
        job, node = jobs[result["job_id"]], nodes.get(result["compute_node_id"], {})
        directory = args.output_dir or node.get("output_dir") or DEFAULT_OUTPUT_DIR
        paths = stdio_paths(directory, stdio_mode(job, workflow), job, result["run_id"],
                            result["attempt_id"])
        row = {name: result[name] for name in (
            "job_id", "status", "run_id", "attempt_id", "return_code", "completion_time",
            "exec_time_minutes")}
        row.update(job_name=job["name"], compute_node=node.get("hostname"),
                   job_stdout=paths[0], job_stderr=paths[1])
        rows.append({name: value for name, value in row.items() if value is not None})
    return {"workflow_id": args.workflow_id, "workflow_name": workflow["name"],
            "workflow_user": workflow["user"], "all_runs": args.all_runs,
            "total_results": len(rows), "results": rows}


# ---- finding out why a server is not reached

class Check(NamedTuple):
    """One line of `torc doctor`."""

    place: str                            # the host that looked
    check: str
    verdict: str                          # ok, warn or fail
    detail: str
    next_step: str = ""


def doctor_urls(args, how):
    """The URLs to look at: the one named, else those of this user's own server."""
    url = args.url or os.environ.get("TORC_API_URL")
    if url:
        return [url]
    server = default_server(how)
    if not server:
        raise Unreachable(f"no server is named, and none of yours listens on port {DEFAULT_PORT}: "
                          "say --url, or start one with `torc server`")
    try:
        return [server.where, *(url for url in server.get("/server_info")["urls"]
                                if url != server.where)]
    except Unauthorized:
        return [server.where]


def email_date(text):
    """Seconds since the epoch of a Date header, None if it cannot be read."""
    from email.utils import parsedate_to_datetime
    try:
        return parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError):
        return None


def check_server(url, how):
    """Checks of a server at a URL from this machine, in the order in which they can fail."""
    import socket
    here = socket.gethostname()
    _, host, _, _ = split_url(url)
    addresses = list(dict.fromkeys(resolved(host)))
    if not addresses:
        return [Check(here, f"name {host}", "fail", "unknown here", MEANINGS["unknown name"])]
    checks = [Check(here, f"name {host}", "ok", ", ".join(addresses[:3]))]
    found = probe(url, None, 5.0, how.get("tls"))
    if found.state != "ok":
        return [*checks, Check(here, url, "fail", found.state, found.text)]
    checks.append(Check(here, url, "ok", f"a Torc server, id {found.server_id}"))
    client = Client(url, **how)
    try:
        asked = time.time()
        told = client.get("/version")
        major = str(told.get("api_version", "?")).partition(".")[0]
        same = major == API_VERSION.partition(".")[0]
        checks.append(Check(here, "version", "ok" if same else "fail",
                            f"{told.get('server', told['version'])}, API {told['api_version']}",
                            "" if same else f"this program speaks API {API_VERSION}"))
        client.page("/workflows", limit=1)
        checks.append(Check(here, "credentials", "ok", f"user {client.user}" + (
            "" if client.password else ", without a password")))
        date = email_date(client.date)
        if date:
            apart = abs(date - (asked + time.time()) / 2)
            near = apart < 5
            checks.append(Check(
                here, "clocks", "ok" if near else "warn", f"{apart:.0f} s apart", "" if near else
                "files may seem older or newer than they are: set the clocks (NTP)"))
    except Unauthorized as error:
        checks.append(Check(here, "credentials", "fail", f"user {client.user} is refused",
                            str(error)))
    except TorcError as error:
        checks.append(Check(here, "operations", "fail", str(error)))
    finally:
        client.close()
    return checks


def check_directory(directory, token):
    """Whether the output directory can be written, and holds what another host has put there."""
    import socket
    here, path = socket.gethostname(), os.path.abspath(directory)
    mark = os.path.join(path, ".torc_doctor")
    try:
        if token:
            os.listdir(path)              # a network file system then asks its server again
            same = read_text(mark) == token
            return Check(here, "output directory", "ok" if same else "fail", path + (
                "" if same else " is not the same directory here"), "" if same else
                "take an --output-dir on a file system that all hosts share")
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "cannot be written by you")
        return Check(here, "output directory", "ok", path)
    except OSError as error:
        return Check(here, "output directory", "fail", f"{path}: {error.strerror}",
                     "take another --output-dir")


def check_from_compute(args, urls):
    """The checks as a compute node of Slurm makes them."""
    import secrets
    import shlex
    import shutil
    import subprocess
    if not shutil.which("srun"):
        raise TorcError("there is no srun on the PATH: --from-compute asks a compute node of Slurm")
    token, path = secrets.token_hex(8), os.path.abspath(args.output_dir)
    mark = os.path.join(path, ".torc_doctor")
    write_private(mark, token)
    command = ["srun", "--ntasks=1", "--nodes=1", "--time=2", "--job-name=torc-doctor",
               "--immediate=60", *shlex.split(args.srun_options or ""), *own_command(), "doctor",
               "-f", "json", "--output-dir", path, "--token", token,
               *(word for url in urls for word in ("--at", url))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        return [Check(**check) for check in json.loads(done.stdout)["checks"]]
    except (ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [Check("a compute node", "this Python and torc.py there", "fail",
                      f"{' '.join(own_command())}: {last}",
                      "both must lie on a file system that compute nodes see")]
    except subprocess.TimeoutExpired:
        return [Check("a compute node", "srun", "fail", "no node within three minutes",
                      "name another partition with --srun-options, or try again later")]
    finally:
        with contextlib.suppress(OSError):
            os.unlink(mark)


def urls_for_workers(urls, how):
    """The URLs that workers would be given for a server at one of these."""
    client = Client(urls[0], **how)
    try:
        return list(worker_urls(client))
    except TorcError:                     # the compute node's own view says why
        return urls
    finally:
        client.close()


@command("doctor", opt("--from-compute", action="store_true",
                       help="look from a compute node, too (a Slurm job of a few seconds)"),
         opt("--srun-options", metavar="TEXT", help="as in '--partition=debug --account=a'"),
         OUTPUT_DIR, opt("--token", help=HIDDEN), opt("--at", action="append", help=HIDDEN),
         client=False, example="torc doctor --url http://login1:8080 --from-compute")
def do_doctor(args, client):
    """Look for what keeps clients and workers from their server; exit code 1 if something does."""
    how = client_options(args)
    urls = args.at or doctor_urls(args, how)
    checks = [check for url in urls for check in check_server(url, how)]
    checks.append(check_directory(args.output_dir, args.token))
    if args.from_compute:
        away = [url for url in urls if not is_loopback(split_url(url)[1])]
        checks += check_from_compute(args, away or urls_for_workers(urls, how))
    failed = any(check.verdict == "fail" for check in checks)
    if args.format == "json":
        print_json({"checks": [check._asdict() for check in checks], "ok": not failed})
    else:
        records = [check._asdict() for check in dict.fromkeys(checks)]
        show_list(args, "checks", "check", "Host=place, What=check, Verdict=verdict, Detail=detail,"
                  " Next Step=next_step", records)
    return 1 if failed else 0


# ---- Slurm

def worker_request(args, client, **more):
    """The WorkerRequest that the options ask for. Raises UsageError, Unreachable."""
    named = args.worker_url or list(filter(None, os.environ.get("TORC_WORKER_URL", "").split(",")))
    return WorkerRequest(os.path.abspath(args.output_dir), os.getcwd(), worker_urls(client, named),
                         getattr(args, "max_parallel_jobs", None),
                         keep_script=getattr(args, "keep_submission_scripts", False), **more)


def later_request(args, client, workflow_id):
    """The WorkerRequest for allocations that a workflow asks for later: as the last ones were."""
    earlier = client.page("/scheduled_compute_nodes", workflow_id=workflow_id, limit=1,
                          reverse_sort=True)["items"]
    request = worker_request(args, client)
    places = {name: earlier[0][name] for name in ("output_dir", "work_dir")
              if earlier and earlier[0].get(name)}
    return request._replace(**places)


def submitted(number, ids):
    """What was submitted, as a sentence."""
    names = ", ".join(map(str, ids[:NAMED_AT_MOST]))
    return (f"{plural(number, 'allocation')} submitted: Slurm job{'' if number == 1 else 's'} "
            f"{names}" + (" ..." if number > NAMED_AT_MOST else ""))


START_ACTIONS = ("on_workflow_start",)
NO_ALLOCATIONS = (
    "workflow {name} asks for no allocations: it needs slurm_schedulers and an action with "
    "trigger_type on_workflow_start and action_type schedule_nodes. `torc slurm generate SPEC` "
    "writes them, `torc slurm schedule-nodes ID` gets allocations for a workflow that exists, "
    "`torc run` needs none")


def asks_for_allocations(actions):
    """Whether an action gets allocations when the workflow starts."""
    return any(action["trigger_type"] in START_ACTIONS
               and action["action_type"] == "schedule_nodes" for action in actions)


def workflow_to_submit(args, client, spec):
    """Id of the workflow that `submit` starts, initialized if it never was."""
    if spec:
        if not asks_for_allocations(spec.payload["actions"]):
            raise UsageError(NO_ALLOCATIONS.format(name=f'"{spec.summary["workflow_name"]}"'))
        missing = [] if args.ignore_missing_data else missing_inputs(spec.payload)
        if missing:
            raise TorcError(f"input files missing: {named(missing)}. No job makes them, so no "
                            "workflow was created; --ignore-missing-data goes on without")
        return create_workflow_from(args, client, spec)
    workflow_id = int(args.spec)
    owner = client.get(f"/workflows/{workflow_id}")["user"]
    confirm(f"Workflow {workflow_id} belongs to {owner}; its commands would run as you, "
            f"{client.user}. Submit it?", owner in (client.user, *(args.allow_owner or ())),
            f"--allow-owner {owner}")
    if not asks_for_allocations(client.get(f"/workflows/{workflow_id}/actions")):
        raise UsageError(NO_ALLOCATIONS.format(name=workflow_id))
    if client.get(f"/workflows/{workflow_id}/status")["is_canceled"]:
        raise TorcError(f"workflow {workflow_id} is canceled: torc workflows reset-status "
                        f"{workflow_id} --failed-only --reinitialize starts it again")
    return workflow_id


@command("submit", opt("spec", nargs="?", metavar="SPEC|ID", help="specification, or id of a "
                       "workflow that exists"), *SPEC_OPTIONS, *WORKERS,
         opt("-i", "--ignore-missing-data", action="store_true", help="though inputs are missing"),
         opt("--allow-owner", action="append", metavar="NAME", help="submit workflows of this user "
             "too, whose commands then run as you; may be repeated"), DRY_RUN,
         client=False, example="torc submit workflow.yaml")
def do_submit(args, client):
    """Start a workflow in allocations of Slurm, as its on_workflow_start actions ask for them."""
    spec = None if names_workflow(args) else load_spec(args, args.spec)
    client = open_client(args, make=spec is not None)
    try:
        request = worker_request(args, client)       # before there is a workflow
        if args.dry_run:
            return dry_submit(args, client, spec, request)
        workflow_id = workflow_to_submit(args, client, spec)
        if client.get(f"/workflows/{workflow_id}/is_uninitialized")["is_uninitialized"]:
            initialize_workflow(client, workflow_id, args.ignore_missing_data)
        return submit_start(args, client, workflow_id, request)
    finally:
        client.close()


def dry_submit(args, client, spec, request):
    """Print the batch scripts that `submit` would hand to Slurm."""
    if spec:
        workflow = {"id": 0, **spec.payload["workflow"]}
        actions, schedulers = spec.payload["actions"], dict(enumerate(
            spec.payload["slurm_schedulers"]))
    else:
        workflow = client.get(f"/workflows/{int(args.spec)}")
        actions = client.get(f"/workflows/{workflow['id']}/actions")
        schedulers = {record["id"]: record for record in client.items(
            "/slurm_schedulers", workflow_id=workflow["id"])}
    if not asks_for_allocations(actions):
        raise UsageError(NO_ALLOCATIONS.format(name=f'"{workflow["name"]}"'))
    scripts = []
    for action in actions:
        config = action["action_config"]
        if action["action_type"] == "schedule_nodes" and action["trigger_type"] in START_ACTIONS:
            scheduler = {"id": 0, **schedulers[config.get("scheduler", config.get("scheduler_id"))]}
            wanted = request._replace(one_worker_per_node=config.get("start_one_worker_per_node"))
            words = worker_words(client, workflow, scheduler, wanted, config["num_allocations"])
            scripts.append({"scheduler": scheduler["name"], "num_allocations":
                            config["num_allocations"], "script": allocation_script(
                                workflow, scheduler, f"wf{workflow['id']}", wanted, words)})
    if args.format == "json":
        print_json({"dry_run": True, "scripts": scripts})
    for script in scripts if args.format == "table" else ():
        print(f"# {plural(script['num_allocations'], 'allocation')} of scheduler "
              f"\"{script['scheduler']}\" would be submitted:\n{script['script']}")


def submit_start(args, client, workflow_id, request):
    """Carry out what `submit` is for; returns the exit code."""
    try:
        done = schedule_pending(client, workflow_id, request, START_ACTIONS)
    except TorcError as error:
        some = getattr(error, "submitted", None)
        error.args = (f"{error}. " + (
            f"{submitted(len(some), some)}; `torc slurm schedule-nodes {workflow_id}` gets more"
            if some else f"Workflow {workflow_id} is there and has no allocation: `torc submit "
                         f"{workflow_id}` tries again"),)
        raise
    ids = [number for _, numbers in done for number in numbers]
    if not ids:
        raise TorcError(f"the allocations of workflow {workflow_id} have been submitted before: "
                        f"`torc slurm schedule-nodes {workflow_id}` gets more, `torc status "
                        f"{workflow_id}` says how it stands")
    tell(args, f"{submitted(len(ids), ids)}; logs in {request.output_dir}; `torc status "
         f"{workflow_id}` says how it stands, `torc watch {workflow_id}` waits")
    say(args, f"Successfully submitted workflow {workflow_id}", workflow_id=workflow_id,
        slurm_jobs=ids, message=f"Successfully submitted workflow {workflow_id}")
    return 0


def choose_scheduler(args, client):
    """The Slurm scheduler record that is named, or the only one there is."""
    if args.scheduler_config_id is not None:
        return client.get(f"/slurm_schedulers/{args.scheduler_config_id}")
    found = list(client.items("/slurm_schedulers", workflow_id=args.workflow_id))
    if len(found) == 1:
        return found[0]
    listed = "\n".join(f"  {record['id']}  {record['name']}" for record in found)
    if not found:
        raise TorcError(f"workflow {args.workflow_id} has no Slurm scheduler: torc slurm create "
                        f"{args.workflow_id} -n NAME -a ACCOUNT makes one")
    if not can_ask():
        raise UsageError(f"which scheduler? Name it with --scheduler-config-id:\n{listed}")
    answer = ask(f"{listed}\nWhich scheduler (ID)?")
    return next((record for record in found if str(record["id"]) == answer), None) or \
        client.get(f"/slurm_schedulers/{answer if answer.isdigit() else 0}")


@command("slurm schedule-nodes", WORKFLOW, *WORKERS,
         opt("-n", "--num-hpc-jobs", type=POSITIVE, default=1, metavar="N",
             help="allocations (default: 1)"),
         opt("--scheduler-config-id", type=COUNT, metavar="ID", help="one of torc slurm list"),
         opt("--start-one-worker-per-node", action="store_true", default=None),
         opt("-j", "--job-prefix", default="", metavar="TEXT", help="of the Slurm jobs' names"),
         example="torc slurm schedule-nodes 3 -n 2")
def do_slurm_schedule(args, client):
    """Get allocations for a workflow that exists, by one of its Slurm schedulers."""
    scheduler = choose_scheduler(args, client)
    if scheduler["workflow_id"] != args.workflow_id:
        raise UsageError(f"scheduler {scheduler['id']} belongs to workflow "
                         f"{scheduler['workflow_id']}, not to {args.workflow_id}")
    request = worker_request(args, client, prefix=args.job_prefix,
                             one_worker_per_node=args.start_one_worker_per_node)
    if client.get(f"/workflows/{args.workflow_id}/is_uninitialized")["is_uninitialized"]:
        initialize_workflow(client, args.workflow_id)
    ids = submit_allocations(client, client.get(f"/workflows/{args.workflow_id}"), scheduler,
                             args.num_hpc_jobs, request)
    say(args, submitted(len(ids), ids), workflow_id=args.workflow_id, slurm_jobs=ids)


def stats_query(args):
    """The query of `slurm stats`."""
    return {"workflow_id": args.workflow_id, "job_id": args.job_id, "run_id": args.run_id,
            "attempt_id": args.attempt_id}


@command("slurm stats", WORKFLOW, JOB_ID, opt("--run-id", type=COUNT, metavar="N"),
         opt("--attempt-id", type=COUNT, metavar="N"), example="torc slurm stats 3")
def do_slurm_stats(args, client):
    """List what Slurm's accounting said of the jobs that ran as steps of srun."""
    show_list(args, "slurm_stats", "record", "Job ID=job_id, Run=run_id, Attempt=attempt_id,"
              " Slurm Job=slurm_job_id, Max RSS=max_rss_bytes, Max VM=max_vm_size_bytes,"
              " Read=max_disk_read_bytes, Written=max_disk_write_bytes, CPU s=ave_cpu_seconds,"
              " Nodes=node_list", client.items("/slurm_stats", **stats_query(args)),
              f"workflow {args.workflow_id}")


ACCOUNT_COLUMNS = (("slurm_job", "JobIDRaw"), ("job_step", "JobName"), ("state", "State"),
                   ("exit_code", "ExitCode"), ("elapsed", "Elapsed"), ("max_rss", "MaxRSS"),
                   ("cpu_time", "CPUTime"), ("nodes", "NodeList"))


@command("slurm sacct", WORKFLOW, opt("-o", "--output-dir", default=DEFAULT_OUTPUT_DIR,
                                      metavar="DIR", help="for --save-json"),
         opt("--save-json", action="store_true", help="keep sacct's own JSON of each allocation"),
         example="torc slurm sacct 3")
def do_slurm_sacct(args, client):
    """Show what Slurm's accounting says of a workflow's allocations and their steps."""
    ids = sorted({record["scheduler_id"] for record in client.items(
        "/scheduled_compute_nodes", workflow_id=args.workflow_id)
        if record["scheduler_type"] == "slurm"})
    rows = []
    if ids:
        out = slurm("sacct", "-n", "-P", "-j", ",".join(map(str, ids)), "-o",
                    ",".join(column for _, column in ACCOUNT_COLUMNS))
        names = [name for name, _ in ACCOUNT_COLUMNS]
        rows = [dict(zip(names, line.split("|"))) for line in out.splitlines()]
    for number in ids if args.save_json else ():
        os.makedirs(args.output_dir, mode=0o700, exist_ok=True)
        write_private(os.path.join(args.output_dir, f"sacct_{number}.json"),
                      slurm("sacct", "-j", number, "--json"))
    show_list(args, "steps", "step", "Slurm Job=slurm_job, Job Step=job_step, State=state,"
              " Exit Code=exit_code, Elapsed=elapsed, Max RSS=max_rss, CPU Time=cpu_time,"
              " Nodes=nodes", rows, f"workflow {args.workflow_id}")


@command("slurm-job-runner", opt("url", metavar="URL[,URL...]"),
         opt("workflow_id", type=COUNT, metavar="WORKFLOW_ID"), opt("output_dir", metavar="DIR"),
         MAX_PARALLEL, POLL, opt("--is-subtask", action="store_true", help="one of several workers "
                                 "of the allocation, each on a node of its own"),
         opt("--startup-delay-seconds", type=COUNT, default=0, metavar="S",
             help="wait for a part of that time, so that many workers do not begin at once"),
         opt("--server-id", metavar="ID", help="work for no other server"),
         opt("--scheduler-config-id", type=COUNT, metavar="ID"),
         opt("--strict-scheduler-match", action="store_true", help="only jobs of that scheduler"),
         opt("--credentials", metavar="FILE", help="a file that `torc submit` has written, where "
             "allocations get no environment"),
         opt("--program-hash", help=HIDDEN), client=False,
         example="torc slurm-job-runner http://login1:8080 3 torc_output")
def do_slurm_job_runner(args, client):
    """Work on a workflow inside an allocation of Slurm; `torc submit` starts it."""
    import random
    where = read_allocation(os.environ)
    how = client_options(args)
    if args.credentials:
        secrets = json_file(args.credentials)
        how.update(password=how["password"] or secrets.get("password"),
                   cookie=how["cookie"] or secrets.get("cookie"))
    if args.program_hash and args.program_hash != own_hash():
        tell(args, f"{own_command()[1]} is another one than when this allocation was submitted",
             "warn")
    if args.startup_delay_seconds:        # many workers must not begin in one moment
        time.sleep(random.uniform(0, args.startup_delay_seconds))
    note = worker_note(args.output_dir, args.workflow_id, where.job_id)
    client = reach_server(args.url.split(","), args.server_id, how, note,
                          say=lambda text: print(f"torc: {text}", file=sys.stderr, flush=True))
    try:
        return work_in_allocation(args, client, where)
    except Unauthorized as error:
        write_private(note, f"{iso_time(time.time())} the worker of allocation {where.job_id} is "
                            f"refused: {error}. If the site hands no environment to allocations, "
                            "submit with --export=NONE in slurm_defaults, and torc keeps the "
                            "password in a file of yours\n")
        raise
    finally:
        client.close()


def json_file(path):
    """The JSON object in a file. Raises TorcError."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise TorcError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def work_in_allocation(args, client, where):
    """Run the worker and keep the allocation's record; the exit code says if torc itself failed."""
    workflow_id = args.workflow_id
    record = client.post("/scheduled_compute_nodes", {
        "workflow_id": workflow_id, "scheduler_id": where.job_id, "scheduler_type": "slurm",
        "scheduler_config_id": args.scheduler_config_id or 0, "status": "active",
        "output_dir": os.path.abspath(args.output_dir), "work_dir": os.getcwd()}, once=True)
    if record["status"] != "active":
        client.put(f"/scheduled_compute_nodes/{record['id']}", {"status": "active"})
    for node in live_allocations(client, workflow_id)[1].get(where.job_id, ()):
        before = node["scheduler"]
        if before.get("node_index") == where.node_index and (
                before.get("restarts", 0) < where.restarts):
            bury_node(client, node, "requeued by Slurm", None)
    options = RunOptions(
        output_dir=args.output_dir, max_parallel_jobs=args.max_parallel_jobs,
        schedule=scheduling(client, workflow_id, lambda: WorkerRequest(
            os.path.abspath(args.output_dir), os.getcwd(), (client.where, *client.others))))
    runner = SlurmRunner(client, workflow_id, options, where, args.scheduler_config_id,
                         args.strict_scheduler_match, args.is_subtask)
    try:
        code = runner.run()
    finally:
        with contextlib.suppress(TorcError):
            close_allocation(client, workflow_id, where, record)
    return code if code > 128 else int(runner.gave_up)


def close_allocation(client, workflow_id, where, record):
    """The last worker of an allocation notes its end, and removes the password's file if no other
    allocation may need it."""
    scheduled, inside = live_allocations(client, workflow_id)
    if not inside.get(where.job_id):
        client.put(f"/scheduled_compute_nodes/{record['id']}", {"status": "complete"})
        if all(other["id"] == record["id"] for other in scheduled) and client.get(
                f"/workflows/{workflow_id}/is_complete")["is_complete"]:
            with contextlib.suppress(OSError):
                os.unlink(credentials_path(workflow_id, client.server_id(),
                                           record.get("output_dir") or ""))


def scheduling(client, workflow_id, make_request):
    """What a runner calls to carry out a schedule_nodes action; None where there is no sbatch.

    make_request: called for the WorkerRequest when it is needed.
    """
    import shutil
    if client.is_local or not shutil.which("sbatch"):
        return None

    def schedule(client, action):
        workflow = client.get(f"/workflows/{workflow_id}")
        ids = schedule_action(client, workflow, action, make_request())
        return f"action {action['id']}: {submitted(len(ids), ids)}"
    return schedule


def look_after(args, client, workflow_id):
    """What an owner's command does on the way: where no runner lives that could, carry out pending
    schedule_nodes actions."""
    import shutil
    if client.is_local or not shutil.which("sbatch"):
        return
    pending = [action for action in client.get(f"/workflows/{workflow_id}/actions/pending")
               if action["action_type"] == "schedule_nodes"
               and action["trigger_type"] not in START_ACTIONS]
    if not pending or client.get(f"/workflows/{workflow_id}")["user"] != client.user or \
            count_records(client, "/compute_nodes", workflow_id=workflow_id, is_active=True):
        return
    try:
        request = later_request(args, client, workflow_id)
        for action, ids in schedule_pending(client, workflow_id, request, sorted(
                {action["trigger_type"] for action in pending})):
            tell(args, f"action {action['id']} ({action['trigger_type']}): "
                       f"{submitted(len(ids), ids)}")
    except TorcError as error:
        tell(args, str(error), "warn")


def allocation_lines(client, workflow_id):
    """A sentence on each allocation that has not ended, and what its worker says if it cannot
    begin."""
    import shutil
    scheduled, _ = live_allocations(client, workflow_id)
    queue, lines = {}, []
    if scheduled and shutil.which("squeue"):
        with contextlib.suppress(TorcError):
            queue = ask_queue({record["scheduler_id"] for record in scheduled})
    for record in scheduled:
        number = record["scheduler_id"]
        entry = queue.get(number)
        if not queue:
            text = f"is {record['status']}"
        elif not entry or entry.phase == "over":
            text = f"has ended: torc workflows sync-status {workflow_id} settles what it left"
        else:
            left = "" if entry.phase == "pending" or entry.time_left_s is None else \
                f", {format_duration(entry.time_left_s)} left"
            where = "" if entry.where in ("(None)", "") else f" {entry.where}"
            text = f"is {entry.state.lower()}{where}{left}"
        lines.append(f"Slurm job {number} {text}")
        lines += read_text(worker_note(record.get("output_dir") or DEFAULT_OUTPUT_DIR, workflow_id,
                                       number)).splitlines()
    return lines


# ---- allocations for what is left

def open_jobs(client, workflow_id):
    """What is left to run, {job id: record}, and the same as group_jobs takes it: jobs named by
    their ids, and the requirements."""
    needs = list(client.items("/resource_requirements", workflow_id=workflow_id))
    number = {need["id"]: index for index, need in enumerate(needs)}
    left = {job["id"]: job for status in ("ready", "blocked", "uninitialized")
            for job in client.items("/jobs", workflow_id=workflow_id, status=status,
                                    include_relationships=True)}
    place = {job_id: index for index, job_id in enumerate(left)}
    jobs = [{"name": str(job_id), "resource_requirements": number[job["resource_requirements_id"]],
             "depends_on": [place[other] for other in job.get("depends_on_job_ids", ())
                            if other in place]} for job_id, job in left.items()]
    return left, jobs, needs


def former_account(client, workflow_id):
    """The account that the workflow's schedulers or slurm_defaults name. Raises UsageError."""
    defaults = json.loads(client.get(f"/workflows/{workflow_id}").get("slurm_defaults") or "{}")
    accounts = [record["account"] for record in client.items("/slurm_schedulers",
                                                             workflow_id=workflow_id)]
    account = defaults.get("account") or (accounts or [None])[-1]
    if not account:
        raise UsageError(f"workflow {workflow_id} has no Slurm scheduler that names an account: "
                         "take --account NAME")
    return account


def regenerate(args, client, workflow_id, submit=False, dry_run=False):
    """Make Slurm schedulers for what is left to run of a workflow, and get allocations for what
    can begin now; the rest is asked for when its jobs are ready.

    Returns {"workflow_id", "dry_run", "schedulers": [...], "slurm_jobs": [...]}. Raises TorcError.
    """
    left, jobs, needs = open_jobs(client, workflow_id)
    if not left:
        raise TorcError(f"workflow {workflow_id} has no job that waits to run")
    account = args.account or former_account(client, workflow_id)
    stamp = time.strftime("regen_%Y%m%d_%H%M%S_")
    plan = plan_allocations(group_jobs(jobs, needs), find_profile(args.profile), account,
                            partition=args.partition, walltime=args.walltime, prefix=stamp)
    report = {"workflow_id": workflow_id, "dry_run": dry_run, "slurm_jobs": [], "schedulers": [
        {**one["scheduler"], "num_allocations": one["num_allocations"], "jobs": len(one["jobs"]),
         "trigger": one["trigger"]} for one in plan]}
    if dry_run:
        return report
    request = worker_request(args, client) if submit else None
    workflow = client.get(f"/workflows/{workflow_id}")
    for one, shown in zip(plan, report["schedulers"]):
        record = client.post("/slurm_schedulers", {**one["scheduler"], "workflow_id": workflow_id})
        shown["id"] = record["id"]
        for name in one["jobs"]:          # one without a scheduler runs in any allocation
            if left[int(name)].get("scheduler_id"):
                client.put(f"/jobs/{name}", {"scheduler_id": record["id"]})
        if one["trigger"] == "on_jobs_ready":
            client.post(f"/workflows/{workflow_id}/actions", {
                "workflow_id": workflow_id, "trigger_type": "on_jobs_ready",
                "action_type": "schedule_nodes", "is_recovery": True,
                "job_ids": [int(name) for name in one["trigger_jobs"]],
                "action_config": {
                    "scheduler_type": "slurm", "scheduler_id": record["id"],
                    "num_allocations": one["num_allocations"],
                    "start_one_worker_per_node": bool(one["start_one_worker_per_node"])}})
        elif submit:
            report["slurm_jobs"] += submit_allocations(
                client, workflow, record, one["num_allocations"], request._replace(
                    one_worker_per_node=one["start_one_worker_per_node"] or None))
    return report


@command("slurm regenerate", WORKFLOW, *WORKERS,
         opt("-a", "--account", metavar="NAME", help="default: that of its schedulers"),
         opt("--profile", metavar="NAME", help="of torc hpc list (default: detected)"),
         opt("--partition", metavar="NAME"),
         opt("--walltime", type=checked_text(parse_walltime), metavar="TIME"),
         opt("--submit", action="store_true", help="and get the allocations"), DRY_RUN,
         example="torc slurm regenerate 3 --submit")
def do_slurm_regenerate(args, client):
    """Make Slurm schedulers anew for the jobs that are left to run."""
    report = regenerate(args, client, args.workflow_id, args.submit, args.dry_run)
    if args.format == "json":
        print_json(report)
        return
    show_list(args, "schedulers", "scheduler", ("" if args.dry_run else "ID=id, ") +
              "Name=name, Partition=partition, Nodes=nodes, Walltime=walltime, Mem=mem,"
              " Allocations=num_allocations, Jobs=jobs, When=trigger", report["schedulers"],
              f"workflow {args.workflow_id}")
    if report["slurm_jobs"]:
        print(submitted(len(report["slurm_jobs"]), report["slurm_jobs"]))
    for one in report["schedulers"]:
        if not args.submit and not args.dry_run and one["trigger"] == "on_workflow_start":
            print(f"torc slurm schedule-nodes {args.workflow_id} --scheduler-config-id {one['id']} "
                  f"-n {one['num_allocations']} gets the allocations of {one['name']}")


# ---- after failures

@command("workflows sync-status", WORKFLOW, OUTPUT_DIR, WORKER_URL, DRY_RUN,
         example="torc workflows sync-status 3 --dry-run")
def do_workflows_sync_status(args, client):
    """Settle what dead runners and ended allocations left: their jobs, results, records."""
    if args.dry_run:
        said = settle_allocations(client, args.workflow_id, dry_run=True) + [
            f"the runner with pid {node['pid']} has died" for node in client.items(
                "/compute_nodes", workflow_id=args.workflow_id, is_active=True)
            if is_dead_here(node)]
    else:
        said = release_dead_nodes(client, args.workflow_id, args.output_dir)
        said += settle_allocations(client, args.workflow_id)
        look_after(args, client, args.workflow_id)
    if args.format == "json":
        print_json({"workflow_id": args.workflow_id, "dry_run": args.dry_run, "changes": said})
    else:
        print("\n".join(said) or f"Workflow {args.workflow_id}: nothing to settle")


class Diagnosis(NamedTuple):
    """Why a job failed, and what it would need to succeed."""

    job: dict
    cause: str                            # memory, runtime, lost or unknown
    text: str
    need: dict                            # changed fields of its resource requirements


def larger_memory(size, factor):
    """A memory size for requirements, `factor` times as large, in whole MB or GB."""
    megabytes = math.ceil(size * factor / 2**20)
    return f"{megabytes // 1024}g" if megabytes % 1024 == 0 else f"{megabytes}m"


def longer_runtime(seconds, factor):
    """A runtime for requirements, `factor` times as long, in whole minutes."""
    return f"PT{max(1, math.ceil(seconds * factor / 60))}M"


def diagnose(job, result, need, limits, peak, memory_factor, runtime_factor):
    """The Diagnosis of a job that failed or was terminated.

    result, need: its records; peak: bytes, 0 if unknown. Memory: it was over its limit, or was
    killed before 80 % of its runtime. Runtime: the time limit's code, or over 90 % of it.
    """
    code, spent = result["return_code"], result["exec_time_minutes"] * 60
    limit, runtime = parse_memory(need["memory"]), parse_duration(need["runtime"])
    known = need["name"] != "default"     # those requirements mean nothing
    if known and peak > limit or code == limits.oom_exit_code and (
            spent < 0.8 * runtime or not known):
        if not known and not peak:
            return Diagnosis(job, "unknown", "it was killed, perhaps for its memory; it has no "
                             "resource requirements that could be raised", {})
        more = larger_memory(max(limit if known else 0, peak), memory_factor)
        used = f"used {format_bytes(peak)}" if peak else "was killed"
        return Diagnosis(job, "memory", f"it {used}, its limit is {need['memory']}",
                         {"memory": more})
    if code == ORPHAN_RETURN_CODE:
        return Diagnosis(job, "lost", "its runner died", {})
    if job["status"] == "terminated" or code == limits.timeout_exit_code or (
            known and spent > 0.9 * runtime):
        if known and spent > 0.9 * runtime:
            return Diagnosis(job, "runtime", f"it ran for {format_duration(spent)}, its runtime is "
                             f"{need['runtime']}",
                             {"runtime": longer_runtime(max(spent, runtime), runtime_factor)})
        return Diagnosis(job, "lost", f"its allocation ended after {format_duration(spent)}", {})
    return Diagnosis(job, "unknown", f"return code {code}", {})


def diagnose_all(client, workflow_id, memory_factor, runtime_factor):
    """Diagnoses of all jobs that failed or were terminated."""
    limits = read_limits(client.get(f"/workflows/{workflow_id}"))
    needs = {need["id"]: need for need in client.items("/resource_requirements",
                                                       workflow_id=workflow_id)}
    results = {result["job_id"]: result for result in client.items("/results",
                                                                   workflow_id=workflow_id)}
    peaks = {}
    for record in client.items("/slurm_stats", workflow_id=workflow_id):
        key = record["job_id"], record["run_id"], record["attempt_id"]
        peaks[key] = record.get("max_rss_bytes") or 0
    found = []
    for status in ("failed", "terminated", "pending_failed"):
        for job in client.items("/jobs", workflow_id=workflow_id, status=status):
            result = results.get(job["id"])
            if not result:
                found.append(Diagnosis(job, "unknown", "no result is kept", {}))
                continue
            key = job["id"], result["run_id"], result["attempt_id"]
            peak = max(result.get("peak_memory_bytes") or 0, peaks.get(key, 0))
            found.append(diagnose(job, result, needs[job["resource_requirements_id"]], limits,
                                  peak, memory_factor, runtime_factor))
    return found


def check_recoverable(client, workflow_id):
    """Raise Invalid unless the workflow has ended with failures and nobody works on it."""
    counted = client.get(f"/workflows/{workflow_id}/counts")
    left = client.get(f"/workflows/{workflow_id}/unfinished")
    runners = len(left["active_nodes"])
    moving = counted["ready"] + counted["pending"] + counted["running"]
    if not counted["is_complete"] and moving and not (
            counted["failed"] + counted["terminated"] + counted["pending_failed"]):
        raise Invalid(f"cannot recover workflow {workflow_id}: nothing has failed, and "
                      f"{plural(moving, 'job')} are ready or running")
    if runners or left["scheduled"]:
        raise Invalid(f"cannot recover workflow {workflow_id}: it is not complete, {runners} "
                      f"runners and {left['scheduled']} allocations are at work or wait for it: "
                      f"torc cancel {workflow_id} ends them, torc wait {workflow_id} waits")


def apply_diagnoses(client, workflow_id, chosen):
    """Give the jobs what they need and make them ready again, with what their failure canceled."""
    groups = {}
    for one in chosen:
        key = one.job["resource_requirements_id"], compact(one.need)
        groups.setdefault(key, []).append(one)
    for (need_id, _), members in groups.items():
        if members[0].need:
            new_id = raise_need(client, workflow_id, need_id, members)
            for one in members if new_id != need_id else ():
                client.put(f"/jobs/{one.job['id']}", {"resource_requirements_id": new_id})
    for one in chosen:
        client.post(f"/jobs/{one.job['id']}/rerun")


def raise_need(client, workflow_id, need_id, members):
    """Raise resource requirements; a copy of them if other jobs, which did not fail, use them.

    Returns the id of the requirements that the members are to have.
    """
    ids = {one.job["id"] for one in members}
    need = client.get(f"/resource_requirements/{need_id}")
    changed = {**need, **{name: max((one.need[name] for one in members), key=size_of(name))
                          for name in members[0].need}}
    others = any(job["resource_requirements_id"] == need_id and job["id"] not in ids
                 for job in client.items("/jobs", workflow_id=workflow_id))
    if not others and need["name"] != "default":
        client.put(f"/resource_requirements/{need_id}", changed)
        return need_id
    taken = {record["name"] for record in client.items("/resource_requirements",
                                                       workflow_id=workflow_id)}
    base = re.sub(r"_recovered\d*$", "", need["name"])
    name = next(name for number in itertools.count(1)
                for name in [f"{base}_recovered{number}"] if name not in taken)
    changed.pop("id")
    return client.post("/resource_requirements", {**changed, "name": name})["id"]


def size_of(name):
    """What compares values of a field of resource requirements."""
    return parse_memory if name == "memory" else parse_duration


MULTIPLIER = bounded(float, 1, "a factor from 1 on")
RECOVERY = (
    opt("--memory-multiplier", type=MULTIPLIER, default=1.5, metavar="X",
        help="for jobs that ran out of memory (default: 1.5)"),
    opt("--retry-unknown", action="store_true", help="also jobs that failed for another reason"),
    opt("--recovery-hook", metavar="COMMAND", help="run before, with the workflow's id as argument "
        "and in TORC_WORKFLOW_ID; jobs that failed for another reason run again then"),
    opt("--partition", metavar="NAME", help="of the new allocations"),
    opt("--walltime", type=checked_text(parse_walltime), metavar="TIME", help="of those"),
    opt("--account", "-a", metavar="NAME", help="for those (default: as before)"),
    opt("--profile", metavar="NAME", help="of torc hpc list (default: detected)"))


def run_hook(command, workflow_id, client):
    """Run a recovery hook. Raises TorcError if it fails."""
    import subprocess
    environment = {**os.environ, **client.job_environment(), "TORC_WORKFLOW_ID": str(workflow_id)}
    done = subprocess.run(["bash", "-c", f'{command} "$@"', "hook", str(workflow_id)],
                          env=environment, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise TorcError(f"the recovery hook {command!r} ended with {done.returncode}, so nothing "
                        "was changed")


def recover_workflow(args, client, workflow_id):
    """Make ready again what failed, with more memory or time where that was the cause, and get
    allocations for it where the workflow has had some.

    Returns {"workflow_id", "dry_run", "jobs": [...], "skipped": [...], "slurm_jobs": [...]}.
    Raises Invalid: not recoverable, TorcError.
    """
    settle_dead(args, client, workflow_id)
    check_recoverable(client, workflow_id)
    found = diagnose_all(client, workflow_id, args.memory_multiplier, args.runtime_multiplier)
    again = args.retry_unknown or args.recovery_hook
    chosen = [one for one in found if one.cause != "unknown" or again]
    report = {"workflow_id": workflow_id, "dry_run": bool(args.dry_run), "slurm_jobs": [],
              **{key: [{"job_id": one.job["id"], "job_name": one.job["name"], "cause": one.cause,
                        "text": one.text, **one.need} for one in some]
                 for key, some in (("jobs", chosen), ("skipped", [
                     one for one in found if one not in chosen]))}}
    if not chosen or args.dry_run:
        return report
    on_slurm = had_allocations(client, workflow_id)
    if on_slurm:                          # what cannot be done later must fail now
        worker_request(args, client)
    if args.recovery_hook:
        run_hook(args.recovery_hook, workflow_id, client)
    client.post(f"/workflows/{workflow_id}/reset_status", force=True)
    apply_diagnoses(client, workflow_id, chosen)
    if on_slurm:
        report["slurm_jobs"] = regenerate(args, client, workflow_id, submit=True)["slurm_jobs"]
    return report


def had_allocations(client, workflow_id):
    """Whether the workflow has run in allocations of Slurm."""
    return bool(client.page("/scheduled_compute_nodes", workflow_id=workflow_id, limit=1)["items"])


def show_recovery(args, report):
    """Print what `recover` did or would do."""
    if args.format == "json":
        print_json(report)
        return
    for key, title in (("jobs", "run again" if report["dry_run"] is False else "would run again"),
                       ("skipped", "failed for a reason that a new try does not mend "
                                   "(--retry-unknown tries all the same)")):
        if report[key]:
            rows = [{**row, "change": ", ".join(f"{name} {row[name]}" for name in (
                "memory", "runtime") if name in row)} for row in report[key]]
            show_list(args, "jobs", "job", "Job ID=job_id, Name=job_name, Cause=cause, Why=text,"
                      " New=change", rows, f"workflow {report['workflow_id']} that {title}")
    if report["slurm_jobs"]:
        print(submitted(len(report["slurm_jobs"]), report["slurm_jobs"]))
    elif report["jobs"] and not report["dry_run"]:
        print(f"torc run {report['workflow_id']} goes on from here")


@command("recover", WORKFLOW, *WORKERS, *RECOVERY,
         opt("--runtime-multiplier", type=MULTIPLIER, default=1.4, metavar="X",
             help="for jobs that ran out of time (default: 1.4)"),
         NO_PROMPTS, DRY_RUN, example="torc recover 3 --dry-run")
def do_recover(args, client):
    """Run again what failed, with more memory or time where that was the cause."""
    if not args.dry_run and not args.no_prompts and can_ask():
        wished, args.dry_run = args.dry_run, True
        report = recover_workflow(args, client, args.workflow_id)
        args.dry_run = wished
        show_recovery(args, report)
        if report["jobs"]:
            confirm(f"Run {plural(len(report['jobs']), 'job')} again?", False)
    report = recover_workflow(args, client, args.workflow_id)
    if not report["jobs"]:
        show_recovery(args, report)
        number = len(report["skipped"])
        raise TorcError(f"workflow {args.workflow_id}: nothing to recover" + (
            f", {plural(number, 'job')} failed for other reasons: --retry-unknown runs them again"
            if number else ""))
    show_recovery(args, report)


# ---- watching

class Watcher:
    """Looks after a workflow until it ends: `torc watch`."""

    def __init__(self, args, client):
        self.args, self.client = args, client
        self.workflow_id = args.workflow_id
        self.watch = Watch()
        self.retries = 0
        self.scheduled_at = -math.inf     # when allocations were asked for last,
        self.ready_since = None           # since when jobs are ready and none is there
        self.told = None
        os.makedirs(args.output_dir, mode=0o700, exist_ok=True)
        import socket
        self.log = os.path.join(args.output_dir,
                                f"watch_{socket.gethostname()}_wf{self.workflow_id}.log")

    def say(self, sentence, level="info"):
        """A line for the user and the log."""
        tell(self.args, sentence, level)
        with contextlib.suppress(OSError), open(self.log, "a", encoding="utf-8") as file:
            file.write(f"[{iso_time(time.time())}] {clean(sentence)}\n")

    def run(self):
        """Watch; returns the exit code."""
        path = f"/workflows/{self.workflow_id}"
        generation = -1
        while True:
            try:
                news = self.client.get(f"{path}/changes", since=generation, wait_s=math.ceil(
                    min(60, self.args.poll_interval)) if generation >= 0 else None)
                generation = news["generation"]
                self.look()
                if news["is_complete"]:
                    code = self.at_end()
                    if code is not None:
                        return code
                    generation = -1
            except Unreachable as error:
                self.say(f"{error}; trying again", "warn")
                time.sleep(10)            # a server that comes back tells nobody

    def look(self):
        """One look at runners and allocations."""
        client, workflow_id = self.client, self.workflow_id
        try:
            said = release_dead_nodes(client, workflow_id, self.args.output_dir)
            for sentence in said + settle_allocations(client, workflow_id, self.watch):
                self.say(sentence)
        except Unreachable:
            raise
        except TorcError as error:        # Slurm's controller is away
            self.say(f"allocations were not looked at: {error}", "warn")
        look_after(self.args, client, workflow_id)
        counted = client.get(f"/workflows/{workflow_id}/counts")
        if self.args.show_job_counts:
            text = ", ".join(f"{counted[name]} {name}" for name in STATUS_NAMES if counted[name])
            if text != self.told:
                self.say(text)
            self.told = text
        if self.args.auto_schedule:
            self.schedule(counted)
        elif not counted["is_complete"]:
            _, hint = prospects(client, workflow_id)
            if hint and hint != self.told:
                self.say(hint)
                self.told = hint

    def schedule(self, counted):
        """--auto-schedule: allocations for ready jobs that nobody runs."""
        args, now = self.args, time.monotonic()
        left = self.client.get(f"/workflows/{self.workflow_id}/unfinished")
        ready = counted["ready"]
        if not ready:
            self.ready_since = None
            return
        self.ready_since = self.ready_since or now
        nobody = not left["active_nodes"] and not left["scheduled"]
        retried = sum(job["attempt_id"] > 1 for job in self.client.items(
            "/jobs", workflow_id=self.workflow_id, status="ready")) if not nobody else 0
        stranded = args.auto_schedule_stranded_timeout
        due = nobody or now - self.scheduled_at >= args.auto_schedule_cooldown and (
            retried >= args.auto_schedule_threshold
            or retried and stranded and now - self.ready_since >= stranded)
        if due and not counted["is_canceled"]:
            self.scheduled_at = now
            made = regenerate(args, self.client, self.workflow_id, submit=True)
            self.say(f"{plural(ready, 'job')} are ready and nobody runs them: "
                     + submitted(len(made["slurm_jobs"]), made["slurm_jobs"]))

    def at_end(self):
        """The workflow is complete: the exit code, or None if it goes on after a recovery."""
        client, workflow_id = self.client, self.workflow_id
        counted = client.get(f"/workflows/{workflow_id}/counts")
        text = ", ".join(f"{counted[name]} {name}" for name in STATUS_NAMES if counted[name])
        code = end_code(counted)
        most = self.args.max_retries
        if code == 0 or counted["is_canceled"] or not self.args.recover:
            self.say(f"workflow {workflow_id} has ended: {text}")
            return code
        if most is not None and self.retries >= most:
            self.say(f"workflow {workflow_id} has ended after {plural(most, 'recovery')}: {text}",
                     "error")
            return 1
        left = client.get(f"/workflows/{workflow_id}/unfinished")
        if left["active_nodes"] or left["scheduled"]:
            time.sleep(1)                 # workers are on their way out
            return None
        self.args.dry_run = False
        report = recover_workflow(self.args, client, workflow_id)
        self.retries += 1
        for row in report["jobs"]:
            change = ", ".join(f"{name} {row[name]}" for name in ("memory", "runtime")
                               if name in row)
            self.say(f"job {row['job_id']} \"{row['job_name']}\" runs again ({row['text']}"
                     + (f"; now {change})" if change else ")"))
        if not report["jobs"]:
            self.say(f"workflow {workflow_id} has ended and cannot be recovered: {text}; --retry-"
                     "unknown runs again what failed for other reasons", "error")
            return 1
        self.say(submitted(len(report["slurm_jobs"]), report["slurm_jobs"])
                 if report["slurm_jobs"] else f"torc run {workflow_id} goes on from here")
        return None


@command("watch", WORKFLOW, OUTPUT_DIR, WORKER_URL, MAX_PARALLEL, KEEP_SCRIPTS, *RECOVERY,
         opt("-p", "--poll-interval", type=bounded(float, 1, "a number of seconds"), default=60.0,
             metavar="S", help="Slurm is asked as often (default: 60); the end is seen at once"),
         opt("-r", "--recover", action="store_true", help="when it ends with failures, run again "
             "what failed, with more memory or time where that was the cause"),
         opt("--max-retries", type=COUNT, metavar="N", help="recover so many times (default: no "
             "limit)"),
         opt("--runtime-multiplier", type=MULTIPLIER, default=1.5, metavar="X",
             help="for jobs that ran out of time (default: 1.5)"),
         opt("-s", "--show-job-counts", action="store_true"),
         opt("--auto-schedule", action="store_true", help="get allocations for ready jobs that "
             "nobody runs"),
         opt("--auto-schedule-threshold", type=COUNT, default=5, metavar="N", help="also, while "
             "others run, for so many jobs that are tried again (default: 5)"),
         opt("--auto-schedule-cooldown", type=COUNT, default=1800, metavar="S",
             help="that not more often than this (default: 1800)"),
         opt("--auto-schedule-stranded-timeout", type=COUNT, default=7200, metavar="S",
             help="for fewer of them after this time; 0: never (default: 7200)"),
         example="torc watch 3 --recover")
def do_watch(args, client):
    """Look after a workflow until it ends: dead runners, ended allocations, recovery.

    Exit code 0: all completed; 1: some failed or were canceled, or could not be recovered.
    """
    return Watcher(args, client).run()


# ---- HPC profiles

PROFILE_NAME = opt("name", nargs="?", metavar="NAME", help="a profile: torc hpc list; default: the "
                   "one of this machine")
PARTITION_COLUMNS = ("Name=name, CPUs=cpus_per_node, Memory=memory, Walltime=walltime,"
                     " GPUs=gpus, Nodes=nodes, Shared=shared,"
                     " On Request=requires_explicit_request")


def walltime_text(text):
    """Seconds of a time as Slurm or ISO 8601 writes it, for argparse."""
    try:
        return parse_duration(text) if text.startswith("P") else parse_walltime(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a time such as 04:00:00, 1-12:00:00 or PT4H") from None


def at_least_one(text):
    """A factor of 1 or more, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1000:
        raise ValueError(f"{text!r} is not a factor from 1 on")
    return value


def partition_row(one):
    """A Partition as JSON with texts for its table."""
    bounds = [str(one.min_nodes or 1), str(least(one.max_nodes, one.max_nodes_per_user) or "")]
    gpus = f"{one.gpus_per_node} {one.gpu_type or ''}".strip() if one.gpus_per_node else ""
    return {**one._asdict(), "features": list(one.features), "gpus": gpus,
            "memory": "" if one.memory_mb is None else format_bytes(one.memory_mb * 2**20),
            "walltime": "" if one.max_walltime_secs is None else slurm_time(one.max_walltime_secs),
            "nodes": f"{bounds[0]}-{bounds[1]}" if bounds[1] else bounds[0] + "-"}


def show_partitions(args, profile, rows, columns=PARTITION_COLUMNS):
    """Print rows of partitions; JSON has their fields without the texts of the table."""
    if args.format == "json":
        texts = ("memory", "walltime", "gpus", "nodes")
        rows = [{name: value for name, value in row.items() if name not in texts} for row in rows]
    show_list(args, "partitions", "partition", columns, rows, profile.name)


@command("hpc list", client=False, example="torc hpc list")
def hpc_list(args, client):
    """List the profiles of HPC systems: yours in ~/.torc/hpc, the built-in ones."""
    profiles = known_profiles()
    here = detect_profile(profiles)
    show_list(args, "profiles", "profile", "Name=name, Display Name=display_name,"
              " Partitions=partitions, Own=own, Detected=detected", [
                  {"name": one.name, "display_name": one.display_name,
                   "partitions": len({part.name for part in one.partitions}),
                   "own": one is not BUILT_IN_PROFILES.get(one.name), "detected": one is here}
                  for one in profiles.values()])
    if args.format != "json":
        print(f"Any other cluster: --profile {DYNAMIC_PROFILE} asks its own Slurm.")


@command("hpc detect", client=False, example="torc hpc detect")
def hpc_detect(args, client):
    """Say which HPC system this machine belongs to; exit code 1 if none is known."""
    import shutil
    found = detect_profile(known_profiles())
    if found:
        say(args, f"{found.name} ({found.display_name})", detected=True, name=found.name,
            display_name=found.display_name)
    elif shutil.which("sinfo"):
        say(args, f"{DYNAMIC_PROFILE} (no known system, but it has Slurm, which is asked for its "
            "partitions)", detected=True, name=DYNAMIC_PROFILE, display_name="this cluster")
    else:
        say(args, "no HPC system that is known, and no Slurm (no sinfo on the PATH)",
            detected=False, name=None)
        return 1


@command("hpc show", PROFILE_NAME, client=False, example="torc hpc show kestrel")
def hpc_show(args, client):
    """Show a profile: how it is detected, account, charge factors; with -f json all of it."""
    profile = find_profile(args.name)
    if args.format == "json":
        print_json(profile_json(profile))
        return
    signs = [f"{sign.name}={sign.value}" if sign.type == "env" else f"{sign.type} {sign.value}"
             for sign in profile.detection]
    fields = {
        "name": profile.name, "display_name": profile.display_name,
        "description": profile.description, "detection": " or ".join(signs),
        "default_account": profile.default_account,
        "charge_factor_cpu": profile.charge_factor_cpu,
        "charge_factor_gpu": profile.charge_factor_gpu, **profile.metadata,
        "partitions": ", ".join(dict.fromkeys(one.name for one in profile.partitions))}
    show_record(args, {name: value for name, value in fields.items() if value not in (None, "")})


@command("hpc partitions", PROFILE_NAME,
         opt("--gpu", action="store_true", help="only those with GPUs"),
         opt("--shared", action="store_true", help="only those whose nodes are shared"),
         client=False, example="torc hpc partitions kestrel --gpu")
def hpc_partitions(args, client):
    """List the partitions of a system: what their nodes have, how long and how wide jobs may be."""
    profile = find_profile(args.name)
    show_partitions(args, profile, [
        partition_row(one) for one in profile.partitions
        if (one.gpus_per_node or not args.gpu) and (one.shared or not args.shared)])


@command("hpc match", PROFILE_NAME,
         opt("--cpus", type=POSITIVE, default=1, metavar="N", help="on a node (default: 1)"),
         opt("--memory", type=checked_text(slurm_memory), default="0", metavar="SIZE",
             help="on a node: 100g, or a number of MB"),
         opt("--walltime", type=readable(walltime_text), default="0", metavar="TIME",
             help="04:00:00, 1-12:00:00 or PT4H"),
         opt("--gpus", type=COUNT, default=0, metavar="N", help="on a node (default: 0)"),
         opt("--nodes", type=POSITIVE, default=1, metavar="N", help="default: 1"),
         client=False, example="torc hpc match kestrel --cpus 52 --memory 100g --walltime 06:00:00")
def hpc_match(args, client):
    """List the partitions that take a job, the best first."""
    profile = find_profile(args.name)
    need = (args.cpus, slurm_memory(args.memory), args.walltime, args.gpus, args.nodes)
    found, best = matching_partitions(profile, *need), best_partition(profile, *need)
    if not found:
        raise TorcError(why_no_partition(profile, *need))
    show_partitions(args, profile, [
        {**partition_row(one), "best": one is best} for one in found],
        PARTITION_COLUMNS + ", Best=best")


def host_pattern(hostname):
    """A regular expression for hosts named like this one, which may differ in their number."""
    return re.sub(r"\d+$", lambda match: r"\d+", re.escape(hostname.partition(".")[0]))


@command("hpc generate",
         opt("-n", "--name", metavar="NAME", help="default: the cluster's own"),
         opt("-d", "--display-name", metavar="TEXT", help="for people"),
         opt("-o", "--output", metavar="FILE", help="default: standard output; one in ~/.torc/hpc "
             "is used from then on"),
         opt("--skip-stdby", action="store_true", help="leave out standby partitions"),
         client=False, example="torc hpc generate -n mycluster -o ~/.torc/hpc/mycluster.json")
def hpc_generate(args, client):
    """Write a profile of this cluster as JSON, from what its Slurm says; edit it as you like."""
    import socket
    config = slurm("scontrol", "show", "config")
    cluster = re.search(r"^ClusterName\s*=\s*(\S+)", config, re.M)
    name = args.name or (cluster[1] if cluster else "cluster")
    if name == DYNAMIC_PROFILE:
        raise UsageError(f"{name} names the profile that is read from the cluster each time: take "
                         "another with --name")
    profile = slurm_profile(name, args.display_name or name)
    kept = [one for one in profile.partitions
            if not (args.skip_stdby and re.search("stdby|standby", one.name))]
    sign = Detection("hostname", f"^{host_pattern(socket.gethostname())}(\\.|$)")
    text = json.dumps(profile_json(profile._replace(
        partitions=tuple(kept), detection=(sign,),
        description=f"read from sinfo and scontrol on {time.strftime('%Y-%m-%d')}")), indent=2)
    if not args.output:
        print(text)
        return
    write_text(args.output, text + "\n")
    own = os.path.expanduser("~/.torc/hpc")
    used = os.path.dirname(os.path.abspath(args.output)) == own and args.output.endswith(".json")
    say(args, f"Wrote {args.output}: profile {name}, {plural(len(kept), 'partition')}, for hosts "
        f"like {socket.gethostname()}" + ("" if used else f". Put it into {own} to use it"),
        name=name, file=args.output, partitions=len(kept))


def write_text(path, text):
    """Write a file as a whole or not at all; makes its directory."""
    directory = os.path.dirname(os.path.abspath(path))
    os.makedirs(directory, exist_ok=True)
    part = os.path.join(directory, f".{os.path.basename(path)}.{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise TorcError(f"{path} cannot be written: {error.strerror}") from None


PLANNING = (
    opt("file", metavar="FILE", help="specification, YAML or JSON; - for standard input"),
    opt("-a", "--account", metavar="NAME", help="default: slurm_defaults.account of the "
        "specification, else the profile's"),
    opt("-p", "--partition", metavar="NAME", help="default: the best for each requirement"),
    opt("--profile", "--hpc-profile", metavar="NAME", help="torc hpc list; default: the one of "
        "this machine"),
    opt("--group-by", choices=("resource-requirements", "partition"),
        default="resource-requirements", help="what gets a scheduler of its own (default: "
        "resource-requirements)"),
    opt("--walltime-strategy", choices=STRATEGIES, default=STRATEGIES[0],
        help="as long as the longest job times the multiplier, or as the partition allows"),
    opt("--walltime-multiplier", type=readable(at_least_one), default=1.5, metavar="X",
        help="default: 1.5"),
    opt("--single-allocation", action="store_true", help="one allocation of several nodes in place "
        "of several of one"),
    opt("--overwrite", action="store_true", help="replace schedulers and schedule_nodes actions "
        "that the specification has"),
)


def read_for_planning(args):
    """(document, Spec, whether it is JSON) of a specification, without its allocations.

    Raises SpecError with all errors, TorcError if it has allocations and is to keep them.
    """
    text = sys.stdin.read() if args.file == "-" else read_spec_text(args.file)
    spec = read_spec(args.file, text, skip_checks=True)
    document, lines = parse_spec_text(args.file, text)
    has = [name for name, there in (
        ("slurm_schedulers", document.get("slurm_schedulers")),
        ("schedule_nodes actions", any(map(schedules_nodes, document.get("actions") or ()))))
        if there]
    if has and not args.overwrite:
        raise TorcError(f"{args.file} has {' and '.join(has)} already: --overwrite replaces them")
    return without_allocations(document), spec, lines.as_json


def make_plan(args, spec, profile, account):
    """The plan of allocations for a Spec."""
    payload = spec.payload
    if not payload["jobs"]:
        raise TorcError(f"{args.file} has no jobs")
    return plan_allocations(
        group_jobs(payload["jobs"], payload["resource_requirements"]), profile, account,
        partition=args.partition, strategy=args.walltime_strategy,
        multiplier=args.walltime_multiplier, single_allocation=args.single_allocation,
        by_partition=args.group_by == "partition")


def account_for(args, document, profile):
    """The account to charge, or None."""
    return args.account or (document.get("slurm_defaults") or {}).get("account") or \
        profile.default_account


def show_plan(args, profile, plan, more=(), columns=""):
    """Print a plan as a table or as JSON; more: a dict of further fields for each entry."""
    rows = [{**one["scheduler"], **one, **extra, "jobs": len(one["jobs"])}
            for one, extra in itertools.zip_longest(plan, more, fillvalue={})]
    for row in rows:
        del row["scheduler"], row["trigger_jobs"]
    show_list(args, "schedulers", "scheduler", "Scheduler=name, Partition=partition, Jobs=jobs,"
              " Allocations=num_allocations, Nodes=nodes, Walltime=walltime, Memory=mem,"
              f" Gres=gres, When=trigger{columns}", rows, f"{args.file} on {profile.name}")


@command("slurm generate", *PLANNING,
         opt("-o", "--output", metavar="FILE", help="default: standard output"),
         opt("--no-actions", action="store_true", help="only schedulers: nothing asks for "
             "allocations by itself"),
         opt("--dry-run", action="store_true", help="show the schedulers, write nothing"),
         client=False, example="torc slurm generate workflow.yaml --account proj -o for_slurm.yaml")
def slurm_generate(args, client):
    """Add to a specification the Slurm schedulers and allocations that its jobs need."""
    document, spec, from_json = read_for_planning(args)
    profile = find_profile(args.profile)
    account = account_for(args, document, profile)
    if not account:
        raise TorcError("no account to charge: say --account NAME, or put account into "
                        "slurm_defaults of the specification")
    plan = make_plan(args, spec, profile, account)
    done, notes = with_allocations(document, plan, not args.no_actions)
    ending = os.path.splitext(args.output or "")[1].lower()
    as_json = {".json": True, ".yaml": False, ".yml": False}.get(
        ending, from_json or (not args.output and args.format == "json"))
    text = specification_text(done, as_json)
    read_spec("the specification that was made", text)
    for note in notes:
        tell(args, note, "warn")
    if args.dry_run:
        show_plan(args, profile, plan)
        return
    if not from_json:
        tell(args, "the new specification has none of the comments of the YAML file", "warn")
    total = sum(one["num_allocations"] for one in plan)
    sentence = f"{plural(len(plan), 'scheduler')} and {plural(total, 'allocation')} on " \
               f"{profile.name} for {plural(len(spec.payload['jobs']), 'job')}"
    if args.output:
        write_text(args.output, text)
        say(args, f"Wrote {args.output}: {sentence}", file=args.output, allocations=total,
            schedulers=[one["scheduler"] for one in plan])
    else:
        tell(args, sentence)
        sys.stdout.write(text)


def idle_nodes():
    """{partition: nodes that are idle now}, by sinfo. Raises TorcError."""
    found = {}
    for line in slurm("sinfo", "-h", "-o", "%P|%t|%D").splitlines():
        name, state, number = (line.split("|") + ["", ""])[:3]
        idle = re.fullmatch(r"idle[~#%]?", state.strip())
        name = name.strip().rstrip("*")
        found[name] = found.get(name, 0) + (number_in(number.strip()) or 0 if idle else 0)
    return found


def predicted_start(scheduler):
    """When Slurm would start an allocation now: a local time, or why it would not take it."""
    words = [f"--{option}={scheduler[name]}" for name, option in (
        ("account", "account"), ("partition", "partition"), ("nodes", "nodes"),
        ("walltime", "time"), ("mem", "mem"), ("gres", "gres"), ("qos", "qos"))
        if scheduler.get(name)]
    code, out, errors = run_program(
        ["sbatch", "--test-only", *words, *(scheduler.get("extra") or "").split(), "--wrap=true"],
        env={**os.environ, "SLURM_TIME_FORMAT": "standard"})
    match = re.search(r"to start at (\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)", errors + out)
    if match and not code:
        return f"{match[1]} {match[2]}"
    last = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
    return re.sub(r"^(sbatch: |error: |allocation failure: )+", "", last)


@command("slurm plan-allocations", *PLANNING,
         opt("--offline", action="store_true", help="do not ask the cluster anything"),
         opt("--skip-test-only", action="store_true", help="do not ask when they would start"),
         client=False, example="torc slurm plan-allocations workflow.yaml --profile kestrel "
         "--offline")
def slurm_plan_allocations(args, client):
    """Show the allocations that slurm generate would ask for, idle nodes, and predicted starts."""
    document, spec, _ = read_for_planning(args)
    if args.offline and args.profile == DYNAMIC_PROFILE:
        raise UsageError(f"--profile {DYNAMIC_PROFILE} asks the cluster, which --offline forbids: "
                         "name another profile")
    profile = detect_profile(known_profiles()) if args.offline and not args.profile else None
    if args.offline and not args.profile and not profile:
        raise UsageError("--offline needs a profile, and none is detected here: --profile NAME, "
                         "see torc hpc list")
    profile = profile or find_profile(args.profile)
    plan = make_plan(args, spec, profile, account_for(args, document, profile) or "")
    more, columns = [{} for _ in plan], ""
    if not args.offline:
        idle, columns = idle_nodes(), ", Idle Nodes=idle_nodes"
        for one, row in zip(plan, more):
            row["idle_nodes"] = idle.get(one["scheduler"]["partition"])
    if not args.offline and not args.skip_test_only:
        columns += ", Start Now=predicted_start"
        for one, row in zip(plan, more):
            row["predicted_start"] = predicted_start(one["scheduler"])
    show_plan(args, profile, plan, more, columns)


# ---- passwords, groups

def bcrypt_cost(text):
    """A cost of bcrypt, for argparse."""
    import argparse
    if not text.isdigit() or not 4 <= int(text) <= 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a cost from 4 to 31")
    return int(text)


PASSWORD_FILE = opt("-f", "--file", metavar="FILE", default=os.environ.get("TORC_AUTH_FILE"),
                    help="the password file (TORC_AUTH_FILE)")
PASSWORD = (opt("--password-stdin", action="store_true", help="read the password from standard "
                "input instead of asking for it"),
            opt("-p", "--password", metavar="TEXT", help="visible to everybody in the list of "
                "processes: better --password-stdin, or wait until it is asked for"))
COST = opt("-c", "--cost", type=bcrypt_cost, default=BCRYPT_COST, metavar="4-31",
           help=f"each step doubles the time of a check (default: {BCRYPT_COST}, 50 ms)")
RELOAD = (opt("--reload-auth", action="store_true", help="let the server of --url read the file "
              "again at once; by itself it does so within a second or two"),
          opt("--server-password", metavar="TEXT", help="for that, if TORC_PASSWORD is not set"))
LEAST_PASSWORD = 8


def open_password_file(args, absent=False):
    """The password file of --file. Raises UsageError, Unreachable."""
    if not args.file:
        raise UsageError("name the password file with --file FILE or TORC_AUTH_FILE")
    return PasswordFile(args.file, absent)


def new_password(args, twice=True):
    """A password from --password, standard input or the terminal. Raises UsageError."""
    if args.password is not None:
        tell(args, "--password is visible to everybody in the list of processes: take "
             "--password-stdin, or let it be asked for", "warn")
        return args.password
    if args.password_stdin or not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    import getpass
    password = getpass.getpass("Password: ", sys.stderr)
    if twice and getpass.getpass("The same again: ", sys.stderr) != password:
        raise UsageError("the two passwords differ: nothing was changed")
    return password


def good_password(args, user):
    """A new password that is not too easy to guess. Raises UsageError."""
    password = new_password(args)
    if len(password) < LEAST_PASSWORD or len(set(password)) < 5 or (
            user and user.lower() in password.lower()):
        raise UsageError(f"that is too easy to guess: a password has at least {LEAST_PASSWORD} "
                         "characters, five different ones, and not the user's name in it")
    return password


def after_change(args, sentence):
    """Say what was done to the password file, and tell the server if that is wished."""
    if args.reload_auth:
        args.password = args.server_password         # not the one that was given to a user
        client = open_client(args, make=False)
        try:
            sentence += ". " + client.post("/admin/reload-auth")["message"]
        finally:
            client.close()
    say(args, sentence, message=sentence)


@command("htpasswd add", opt("user", metavar="USER"), PASSWORD_FILE, *PASSWORD, COST, *RELOAD,
         client=False, example="torc htpasswd add --file users.htpasswd alice")
def do_htpasswd_add(args, client):
    """Give a user a password, or another one; makes the file (0600) if there is none."""
    file = open_password_file(args, absent=True)
    known = args.user in file.users
    file.set(args.user, "")               # a bad name is refused before anything is asked
    file.set(args.user, hash_password(good_password(args, args.user), args.cost))
    file.write()
    after_change(args, f"{'Changed the password of' if known else 'Added'} {args.user} in "
                       f"{args.file}")


@command("htpasswd remove", opt("user", metavar="USER"), PASSWORD_FILE, *RELOAD,
         client=False, example="torc htpasswd remove --file users.htpasswd alice")
def do_htpasswd_remove(args, client):
    """Take a user out of the file."""
    file = open_password_file(args)
    if args.user not in file.users:
        raise NotFound(f"there is no user {args.user} in {args.file}"
                       f"{nearest(args.user, file.users)}")
    file.set(args.user, None)
    file.write()
    after_change(args, f"Removed {args.user} from {args.file}")


@command("htpasswd list", PASSWORD_FILE, client=False,
         example="torc htpasswd list --file users.htpasswd")
def do_htpasswd_list(args, client):
    """List the users of a password file."""
    records = [{"user": user, "hash": next(name for start, name in HASHES.items()
                                           if hashed.startswith(start))}
               for user, hashed in open_password_file(args).users.items()]
    show_list(args, "users", "user", "User=user, Hash=hash", records, args.file)


@command("htpasswd verify", opt("user", metavar="USER"), PASSWORD_FILE, *PASSWORD, client=False,
         example="torc htpasswd verify --file users.htpasswd alice")
def do_htpasswd_verify(args, client):
    """Check a user's password; exit code 1 if it is wrong."""
    hashed = open_password_file(args).users.get(args.user)
    good = bool(hashed) and check_password(new_password(args, twice=False), hashed)
    say(args, "The password is right." if good else "User or password is wrong.", valid=good)
    return 0 if good else 1


@command("htpasswd hash", opt("user", nargs="?", metavar="USER"), *PASSWORD, COST, client=False,
         example="torc htpasswd hash alice")
def do_htpasswd_hash(args, client):
    """Print the line of a password file for a password, without touching a file."""
    hashed = hash_password(good_password(args, args.user), args.cost)
    say(args, f"{args.user}:{hashed}" if args.user else hashed, user=args.user, hash=hashed)


GROUP_ID = opt("group_id", type=COUNT, metavar="GROUP")
USER_NAME = opt("user_name", metavar="USER")
GROUP_COLUMNS = "ID=id, Name=name, Description=description, Created=created_at"
MEMBER_COLUMNS = "ID=id, User=user_name, Role=role, Created=created_at"


@command("access-groups create", opt("name", metavar="NAME"), opt("-d", "--description"),
         example="torc access-groups create climate -d 'the climate team'")
def do_group_create(args, client):
    """Create a group of users with whom workflows can be shared."""
    group = client.post("/access_groups", {"name": args.name, "description": args.description})
    say(args, f"Created access group {group['id']} \"{clean(args.name)}\"", **group)


@command("access-groups get", GROUP_ID, example="torc access-groups get 2")
def do_group_get(args, client):
    """Show a group."""
    show_record(args, client.get(f"/access_groups/{args.group_id}"))


@command("access-groups list", *SHORT_PAGING, example="torc access-groups list")
def do_group_list(args, client):
    """List all groups."""
    show_list(args, "groups", "group", GROUP_COLUMNS, client.items("/access_groups"))


@command("access-groups delete", GROUP_ID, FORCE, example="torc access-groups delete 2")
def do_group_delete(args, client):
    """Delete a group; what it shared is shared no more."""
    group = client.get(f"/access_groups/{args.group_id}")
    confirm(f"Delete access group \"{clean(group['name'])}\"?", args.force)
    client.delete(f"/access_groups/{args.group_id}")
    say(args, f"Deleted access group {args.group_id}", **group)


@command("access-groups add-user", GROUP_ID, USER_NAME,
         opt("-r", "--role", choices=("member", "admin"), default="member"),
         example="torc access-groups add-user 2 bob")
def do_group_add_user(args, client):
    """Put a user into a group; an admin of a group changes its members."""
    member = client.post(f"/access_groups/{args.group_id}/members", {
        "user_name": args.user_name, "role": args.role, "group_id": args.group_id})
    say(args, f"Added {args.user_name} to access group {args.group_id} as {args.role}", **member)


@command("access-groups remove-user", GROUP_ID, USER_NAME,
         example="torc access-groups remove-user 2 bob")
def do_group_remove_user(args, client):
    """Take a user out of a group."""
    from urllib.parse import quote
    member = client.delete(f"/access_groups/{args.group_id}/members/{quote(args.user_name, '')}")
    say(args, f"Removed {args.user_name} from access group {args.group_id}", **member)


@command("access-groups list-members", GROUP_ID, example="torc access-groups list-members 2")
def do_group_members(args, client):
    """List the users in a group."""
    show_list(args, "members", "member", MEMBER_COLUMNS,
              client.items(f"/access_groups/{args.group_id}/members"))


@command("access-groups list-user-groups", USER_NAME,
         example="torc access-groups list-user-groups bob")
def do_user_groups(args, client):
    """List the groups a user is in."""
    show_list(args, "groups", "group", GROUP_COLUMNS,
              client.items(f"/users/{args.user_name}/groups"))


@command("access-groups list-workflow-groups", WORKFLOW,
         example="torc access-groups list-workflow-groups 3")
def do_workflow_groups(args, client):
    """List the groups a workflow is shared with."""
    show_list(args, "groups", "group", GROUP_COLUMNS,
              client.items(f"/workflows/{args.workflow_id}/access_groups"))


@command("access-groups add-workflow", opt("workflow_id", type=COUNT, metavar="WORKFLOW_ID"),
         GROUP_ID, example="torc access-groups add-workflow 3 2")
def do_group_add_workflow(args, client):
    """Let a group use a workflow: see it, run it, change it."""
    link = client.post(f"/workflows/{args.workflow_id}/access_groups/{args.group_id}")
    say(args, f"Shared workflow {args.workflow_id} with access group {args.group_id}", **link)


@command("access-groups remove-workflow", opt("workflow_id", type=COUNT, metavar="WORKFLOW_ID"),
         GROUP_ID, example="torc access-groups remove-workflow 3 2")
def do_group_remove_workflow(args, client):
    """Share a workflow with a group no more."""
    link = client.delete(f"/workflows/{args.workflow_id}/access_groups/{args.group_id}")
    say(args, f"Workflow {args.workflow_id} is shared with access group {args.group_id} no more",
        **link)


@command("admin reload-auth", example="torc admin reload-auth")
def do_reload_auth(args, client):
    """Let the server read its password file again."""
    answer = client.post("/admin/reload-auth")
    say(args, f"{answer['message']}: {plural(answer['user_count'], 'user')}", **answer)


# ---- completion

def completion_words():
    """{command words so far: [words that may follow]}, options included."""
    common = [flags[-1] for flags, _ in GLOBAL]
    words = {"": sorted({name.partition(" ")[0] for name in COMMANDS}) + common}
    words.update({name: list(rest) for name, rest in branches().items()})
    for found in COMMANDS.values():
        shown = [flag for flag, settings in flags_of(found.options).items()
                 if flag[:2] == "--" and settings.get("help") != HIDDEN]
        words[found.name] = words.get(found.name, []) + list(dict.fromkeys([*shown, *common]))
    return words


def valued_flags():
    """(command, flag, settings) of every option that is followed by a value."""
    options = {"": (), **{found.name: found.options for found in COMMANDS.values()}}
    return [(name, flag, settings) for name, own in options.items()
            for flag, settings in {**flags_of(GLOBAL), **flags_of(own)}.items()
            if has_value(settings)]


def shell_cases():
    """What bash and zsh share: the pattern of command words, the lines of a case statement."""
    words = completion_words()
    values = {}                           # values that may follow: the places where they do
    for name, flag, settings in valued_flags():
        values.setdefault(" ".join(settings.get("choices", ())), []).append(f'"{name}|{flag}"')
    pattern = "|".join(f'"{name}"' if " " in name else f'" {name}"' for name in words if name)
    return (f'            {pattern}) at="${{at:+$at }}$word" ;;',
            [f'        {"|".join(places)}) list="{text}" ;;' for text, places in values.items()]
            + ['        *) case "$at" in']
            + [f'            "{name}") list="{" ".join(rest)}" ;;' for name, rest in words.items()]
            + ["        esac ;;"])


SHELL_FUNCTION = """\
_torc() {{
    local at="" word list="" i
    for ((i = {first}; i < {current}; i++)); do
        word="${{{words}[i]}}"
        case "$at $word" in
{path}
        esac
    done
    case "$at|${{{words}[{current}-1]}}" in
{cases}
    esac
    {give}
}}
{register}"""


def bash_completion():
    """A completion script for bash."""
    path, cases = shell_cases()
    return SHELL_FUNCTION.format(
        first=1, current="COMP_CWORD", words="COMP_WORDS", path=path, cases="\n".join(cases),
        give="""local word="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=($(compgen -W "$list" -- "$word"))
    # Options only for who begins one: so files are offered where a file may stand.
    [[ $word == -* ]] || COMPREPLY=($(printf '%s\\n' "${COMPREPLY[@]}" | grep -v '^-'))""",
        register="complete -o default -F _torc torc torc.py")


def zsh_completion():
    """A completion script for zsh, which counts words from 1."""
    path, cases = shell_cases()
    return "#compdef torc torc.py\n" + SHELL_FUNCTION.format(
        first=2, current="CURRENT", words="words", path=path, cases="\n".join(cases),
        give='compadd -- ${=list} || _files', register="compdef _torc torc torc.py")


def fish_text(text):
    """A text in quotes, as fish reads it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def fish_completion():
    """A completion script for fish."""
    words = completion_words()
    lines = ["function __torc_at", "    set -l at", "    for word in (commandline -opc)[2..-1]",
             "        if contains -- (string join ' ' $at $word) "
             + " ".join(fish_text(name) for name in words if name),
             "            set at $at $word", "        end", "    end",
             '    test "$at" = "$argv[1]"', "end"]
    for name, rest in words.items():
        for word in rest:
            if word[:1] != "-":
                summary = summary_of(f"{name} {word}".strip())
                lines.append(f"complete -c torc -f -n {fish_text(f'__torc_at {fish_text(name)}')}"
                             f" -a {word} -d {fish_text(summary)}")
    for found in COMMANDS.values():
        for flags, settings in found.options:
            lines += fish_option(found.name, flags, settings)
    for flags, settings in GLOBAL:
        lines += fish_option(None, flags, settings)
    return "\n".join(lines)


def fish_option(name, flags, settings):
    """The line of an option; none for positional arguments and hidden options."""
    if flags[0][0] != "-" or settings.get("help") == HIDDEN:
        return []
    where = f" -n {fish_text(f'__torc_at {fish_text(name)}')}" if name is not None else ""
    names = "".join(f" -{'l' if flag[:2] == '--' else 's'} {flag.lstrip('-')}" for flag in flags)
    values = f" -x -a {fish_text(' '.join(settings['choices']))}" if settings.get("choices") else \
        " -r" if has_value(settings) else ""
    return [f"complete -c torc{where}{names}{values} -d {fish_text(settings.get('help', ''))}"]


SHELLS = {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}


@command("completions", opt("shell", choices=tuple(SHELLS)), client=False,
         example="source <(torc completions bash)")
def do_completions(args, client):
    """Print a script that completes commands and options with the tab key."""
    print(SHELLS[args.shell]())


# ---- server and bundle

SERVER_OPTIONS = (
    opt("-H", "--host", default="127.0.0.1", metavar="NAME",
        help="address to listen on; 0.0.0.0 is open to everybody who reaches this machine "
        "(default: 127.0.0.1)"),
    opt("-p", "--port", type=bounded(int, 0, "a port"), default=DEFAULT_PORT, metavar="N",
        help=f"0 takes a free one (default: {DEFAULT_PORT})"),
    opt("-d", "--database", metavar="FILE", help="default: DATABASE_URL=sqlite:FILE, else torc.db"),
    opt("-t", "--threads", type=POSITIVE, default=8, metavar="N",
        help="requests served at a time (default: 8)"),
    opt("-l", "--log-level", choices=LOG_LEVELS, help="RUST_LOG; default: info"),
    opt("--log-dir", metavar="DIR", help="log to files there too (TORC_LOG_DIR)"),
    opt("--json-logs", action="store_true", help="a JSON object a line"),
    opt("--auth-file", default=os.environ.get("TORC_AUTH_FILE"), metavar="FILE",
        help="user names and password hashes as of torc-htpasswd (TORC_AUTH_FILE)"),
    opt("--require-auth", action="store_true", help="answer nobody without a good password"),
    opt("--enforce-access-control", action="store_true",
        help="workflows are for their owners, and for the groups they are shared with"),
    opt("--credential-cache-ttl-secs", type=bounded(float, 0, "a number of seconds"), metavar="S",
        default=os.environ.get("TORC_CREDENTIAL_CACHE_TTL_SECS", "60"),
        help="how long a checked password is believed (default: 60)"),
    opt("--admin-user", action="append", metavar="NAME",
        help="may do everything; may be repeated (TORC_ADMIN_USERS, with commas)"),
    opt("--https", action="store_true", help="speak TLS"),
    opt("--tls-cert", default=os.environ.get("TORC_TLS_CERT"), metavar="FILE",
        help="certificate chain, PEM (TORC_TLS_CERT)"),
    opt("--tls-key", default=os.environ.get("TORC_TLS_KEY"), metavar="FILE",
        help="its private key, PEM (TORC_TLS_KEY)"),
    opt("-c", "--completion-check-interval-secs", type=float, metavar="S",
        help="accepted and not used: jobs are freed at once"),
)


PID_FILE = opt("--pid-file", metavar="FILE", help="of a server in the background (default: "
               "~/.torc/torc-server.pid)")
DAEMON = (opt("--daemon", action="store_true", help="go on in the background, when it serves"),
          PID_FILE)


@command("server run", *SERVER_OPTIONS, *DAEMON, client=False,
         example="torc server run --host 0.0.0.0 --port 8080 --database torc.db")
def do_server(args, client):
    """Serve workflows over HTTP until interrupted."""
    if args.port > 65535:
        raise UsageError(f"port {args.port} is larger than 65535")
    args.log_dir = args.log_dir or os.environ.get("TORC_LOG_DIR")
    args.admin_user = args.admin_user or [
        name.strip() for name in os.environ.get("TORC_ADMIN_USERS", "").split(",") if name.strip()]
    return serve(args)


COMMANDS["server"] = COMMANDS["server run"]._replace(name="server")


@command("server stop", PID_FILE, client=False, example="torc server stop")
def do_server_stop(args, client):
    """End a server that runs in the background."""
    import signal
    path = args.pid_file or default_pid_file()
    found = running_server(path)
    if not found:
        raise NotFound(f"no server runs in the background: {path} "
                       + ("names none that lives" if os.path.exists(path) else "does not exist"))
    os.kill(found.pid, signal.SIGTERM)
    if not wait_for_end(found.pid, 60):
        raise TorcError(f"the server (pid {found.pid}) has not ended within a minute: it waits for "
                        f"requests at work; kill -9 {found.pid} loses nothing that was answered")
    say(args, f"The server (pid {found.pid}) has ended", pid=found.pid, status="stopped")


@command("server status", PID_FILE, client=False, example="torc server status")
def do_server_status(args, client):
    """Say whether a server runs in the background, and where; exit code 1 if none does."""
    found = running_server(args.pid_file or default_pid_file())
    if not found:
        say(args, "No server runs in the background", running=False)
        return 1
    say(args, f"A server runs in the background: pid {found.pid}, since {local_time(found.since)}"
        + (f", {found.database}, at {', '.join(found.urls)}" if found.urls else ""),
        running=True, pid=found.pid, since=iso_time(found.since), urls=list(found.urls),
        database=found.database)
    return 0


# ---- the server as a service

USER_UNIT = opt("--user", action="store_true", help="of yours, not of the system")


def service_step(args, *words):
    """Let systemd do something; says so, or that it must be done later."""
    code, said = systemctl(args.user, *words)
    line = " ".join(["systemctl", *(["--user"] if args.user else []), *words])
    if code is None:
        tell(args, f"{said}: `{line}` is to be run where it does; `torc server run --daemon` needs "
                   "no systemd", "warn")
    elif code:
        raise TorcError(f"{line}: {said}")
    return said


def server_words(args):
    """The command line of the server that the options of `service install` ask for."""
    words = [*own_command(), "server", "run"]
    usual = {"host": "127.0.0.1", "port": DEFAULT_PORT, "threads": 8, "log_level": "info",
             "credential_cache_ttl_secs": 60.0}
    for flags, settings in SERVER_OPTIONS:
        name = dests([(flags, settings)])[0]
        value = getattr(args, name)
        flag = next(flag for flag in flags if flag[:2] == "--")
        if value is None or value is False or value == usual.get(name):
            continue
        if name in ("auth_file", "tls_cert", "tls_key", "database", "log_dir"):
            value = os.path.abspath(value)
        for one in value if isinstance(value, list) else [value]:
            words += [flag] if one is True else [flag, str(one)]
    return words


@command("server service install", *SERVER_OPTIONS, USER_UNIT, DRY_RUN, client=False,
         example="torc server service install --user --host 0.0.0.0 --auth-file users "
                 "--require-auth")
def do_service_install(args, client):
    """Let systemd run the server, also after a restart of the machine."""
    if not sys.platform.startswith("linux"):
        raise TorcError("services are for Linux with systemd: take torc server run --daemon")
    if not args.user and os.geteuid() != 0 and not args.dry_run:
        raise Forbidden("a service of the system needs root: take --user for one of your own")
    home = torc_home() if args.user else "/var/lib/torc"
    args.database = args.database or os.path.join(home, "torc.db")
    args.log_dir = args.log_dir or (os.path.join(home, "logs") if args.user else "/var/log/torc")
    text, path = unit_text(server_words(args), home, args.user), unit_path(args.user)
    if args.dry_run:
        say(args, f"# {path}\n{text}", path=path, unit=text, dry_run=True)
        return
    for directory in (home, args.log_dir):
        os.makedirs(directory, mode=0o700, exist_ok=True)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_private(path, text)
    say(args, f"Wrote {path}", path=path, unit=text)
    service_step(args, "daemon-reload")
    service_step(args, "enable", "--now", UNIT_NAME)
    if args.user:
        tell(args, f"`loginctl enable-linger {user_name()}` lets it run while you are not logged "
                   "in, if the site allows that")


@command("server service uninstall", USER_UNIT, DRY_RUN, client=False,
         example="torc server service uninstall --user")
def do_service_uninstall(args, client):
    """End the service and remove its unit; database and logs stay."""
    path = unit_path(args.user)
    if not os.path.exists(path):
        raise NotFound(f"there is no {path}: nothing is installed")
    if not args.dry_run:
        service_step(args, "disable", "--now", UNIT_NAME)
        os.unlink(path)
        service_step(args, "daemon-reload")
    say(args, f"{'Would remove' if args.dry_run else 'Removed'} {path}", path=path,
        dry_run=args.dry_run)


def service_verb(verb, summary):
    """Add `server service VERB`."""
    @command(f"server service {verb}", USER_UNIT, client=False, summary=summary,
             example=f"torc server service {verb} --user")
    def act(args, client):
        path = unit_path(args.user)
        if not os.path.exists(path):
            raise NotFound(f"there is no {path}: torc server service install makes it")
        code, said = systemctl(args.user, verb, UNIT_NAME)
        if code is None:
            raise TorcError(f"{said}: torc server run --daemon needs no systemd")
        say(args, said or f"systemd did {verb} {UNIT_NAME}", output=said, code=code)
        return 1 if code else 0


service_verb("start", "Start the service.")
service_verb("stop", "End the service until the next start.")
service_verb("status", "Say how the service stands.")

BUNDLED = ("bottle", "waitress", "yaml")
BUNDLED_DISTRIBUTIONS = ("bottle", "waitress", "PyYAML")
BUNDLE_MAIN = '''\
"""Starts the torc in this archive."""
import sys
import types

# Compiled by hand: the import of a module from an archive compiles it twice.
path = __loader__.archive + "/torc.py"
torc = sys.modules["torc"] = types.ModuleType("torc")
torc.__file__, torc.__loader__ = path, __loader__
exec(compile(__loader__.get_data(path), path, "exec"), torc.__dict__)
sys.exit(torc.main())
'''


def package_files(name):
    """(name in the archive, path) of the pure Python of an installed module or package."""
    import importlib.util
    found = importlib.util.find_spec(name)
    if not found or not found.origin or not os.path.isfile(found.origin):
        raise MissingPackage(name, "a bundle")
    if not found.submodule_search_locations:
        return [(f"{name}.py", found.origin)]
    files = []
    base = os.path.dirname(found.origin)
    for directory, below, names in os.walk(base):
        below[:] = sorted(part for part in below if part not in ("__pycache__", "tests"))
        files += [(os.path.relpath(os.path.join(directory, part), os.path.dirname(base)),
                   os.path.join(directory, part)) for part in sorted(names)
                  if part.endswith((".py", ".typed"))]
    return files


def licence_files():
    """(name in the archive, path) of the licences of the packages in a bundle."""
    from importlib import metadata
    files = []
    for name in BUNDLED_DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            files += [(f"licenses/{name}/{path.name}", str(path.locate()))
                      for path in metadata.files(name) or ()
                      if re.match(r"(?i)(licen[cs]e|copying|authors)", path.name)]
    return [(name, path) for name, path in files if os.path.isfile(path)]


def bundle(path):
    """Write an executable archive of torc with bottle, waitress and PyYAML; the same for the same
    input. Raises TorcError, MissingPackage, OSError."""
    import zipfile
    if not os.path.isfile(__file__):
        raise TorcError("this torc is a bundle itself: copy it, or make one with torc.py")
    contents = [("torc.py", __file__), *(file for name in BUNDLED for file in package_files(name)),
                *licence_files()]
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(b"#!/usr/bin/env python3\n")
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(zipfile.ZipInfo("__main__.py"), BUNDLE_MAIN)
                for name, source in contents:
                    with open(source, "rb") as text:
                        archive.writestr(zipfile.ZipInfo(name), text.read(), zipfile.ZIP_DEFLATED)
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@command("bundle", opt("path", metavar="FILE", nargs="?", default="torc.pyz"), client=False,
         example="torc bundle torc.pyz && ./torc.pyz run --example hello")
def do_bundle(args, client):
    """Write one executable file with torc and all it needs, for machines with bare Python."""
    bundle(args.path)
    say(args, f"Wrote {args.path} ({format_bytes(os.path.getsize(args.path))})", path=args.path,
        size=os.path.getsize(args.path), hash=own_hash())


# ---- main

def open_client(args, make):
    """The client that the options and the environment ask for."""
    directory = getattr(args, "output_dir", None) or DEFAULT_OUTPUT_DIR
    return connect(args.database, args.url, directory, client_options(args),
                   tell=lambda sentence: tell(args, sentence), create=make)


def client_options(args):
    """What options and environment say of a Client, as its keyword arguments."""
    password = args.password or os.environ.get("TORC_PASSWORD")
    if args.password:
        tell(args, "--password is visible to everybody in the list of processes: take "
             "TORC_PASSWORD or --prompt-password", "warn")
    elif args.prompt_password:
        import getpass
        password = getpass.getpass(f"Password of {user_name()}: ", sys.stderr)
    insecure = os.environ.get("TORC_TLS_INSECURE", "").lower() in ("1", "true", "yes")
    return {"password": password,
            "tls": {"ca_cert": args.tls_ca_cert or os.environ.get("TORC_TLS_CA_CERT"),
                    "insecure": args.tls_insecure or insecure},
            "cookie": args.cookie_header or os.environ.get("TORC_COOKIE_HEADER")}


def call_command(found, args):
    """Run a command with the client it wants; returns the exit code."""
    if not found.client:
        return found.function(args, None) or 0
    client = open_client(args, make=found.client == "make")
    try:
        if getattr(args, "workflow_id", 0) is None:
            args.workflow_id = choose_workflow(args, client)
        return found.function(args, client) or 0
    finally:
        client.close()


def execute(argv):
    """Carry out a command line; returns the exit code."""
    head, name, rest = find_command(argv)
    found = COMMANDS.get(name)
    if not name and rest[:1] == ["help"]:
        _, name, rest = find_command(rest[1:])
        found, head = COMMANDS.get(name), ["--help"]
    if wants(head + rest, "-V", "--version"):
        print(f"torc {VERSION} ({own_hash()}, speaks Torc API {API_VERSION})")
        return 0
    if found and not wants(head + rest, "-h", "--help"):
        return call_command(found, parse_command(found, head, rest))
    if not found and rest:
        raise unknown_command(name, rest[0])
    asked = not name or found or wants(head, "-h", "--help")
    text = command_help(found) if found else branch_help(name) if name else overview()
    print(text, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def report_error(error, as_json):
    """Show a failure once: a line on stderr (several for a specification), JSON on stdout."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    prefix = "\x1b[31mtorc:\x1b[0m" if colour else "torc:"
    for line in getattr(error, "errors", None) or [str(error)]:
        print(f"{prefix} {line}", file=sys.stderr)
    if as_json:
        print_json({"error": {"error": error.title, "message": str(error),
                              **({"errors": error.errors} if hasattr(error, "errors") else {})}})
    return error.exit_code


def main(argv=None):
    """The program: a command line to an exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return execute(argv)
        except TorcError as error:
            return report_error(error, wants_json(argv))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("torc: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:               # the reader has had enough
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return report_error(TorcError(f"{place}{error.strerror or error}"), wants_json(argv))


def main_server():
    """The program torc-server: `torc server` under its own name."""
    return main(["server", *sys.argv[1:]])


def main_htpasswd():
    """The program torc-htpasswd: `torc htpasswd` under its own name."""
    return main(["htpasswd", *sys.argv[1:]])


def absent_program(word):
    """The program torc-WORD, which this version does not have."""
    def program():
        return main([word])
    return program


def main_slurm_job_runner():
    """The program torc-slurm-job-runner: `torc slurm-job-runner` under its own name."""
    return main(["slurm-job-runner", *sys.argv[1:]])


main_dash = absent_program("dash")

if __name__ == "__main__":
    sys.exit(main())
