#!/usr/bin/env bash
# What tpu.sh runs on every worker of a TPU VM; everything lives in ~/compactlm. Also usable by hand there.
#
#   worker.sh install SOURCE [ROWS]   a virtual environment with the package, and rows from a bucket in data/.
#                                     SOURCE: git+https://HOST/REPOSITORY@TAG | FILE.whl
#   worker.sh start COMMAND ...       in a detached terminal, supervised; a second start of the same command does nothing
#   worker.sh supervise COMMAND ...   the same in the foreground; its output goes to ~/compactlm/run.log
#   worker.sh status | stop
#   worker.sh copy SOURCE TARGET      a run directory to or from a bucket
#
# Restarts by exit code (docs/guide.md): 75 always; 74 at most 3 times, waiting longer each time; others never.
# On a pod every worker decides alone, by its own process's code. That agrees because `compactlm train` leaves with 75
# on all workers together, and a worker that comes back first waits in jax.distributed for the rest (5 minutes by
# default: every pause here is shorter). Where one crashed and does not come back, `tpu.sh watch` stops the others.
set -euo pipefail

self=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
root=${COMPACTLM_ROOT:-$HOME/compactlm}
pause=${COMPACTLM_PAUSE:-10} # seconds
uv=$root/uv/bin/uv
uv_version=0.13.9
python_version=3.12

fail() { # CODE MESSAGE
  echo "worker.sh: $2" >&2
  exit "$1"
}

# Images for v2 to v6e are Ubuntu 22.04, whose Python 3.10 is too old. uv brings a Python of its own: no root, and no
# apt, which unattended upgrades lock for the first minutes of a VM.
fetch_uv() {
  [[ -x $uv ]] && return
  python3 -m pip install --quiet --target "$root/uv" "uv==$uv_version" ||
    fail 74 "uv $uv_version could not be fetched (see above); try again"
}

fetch_source() { # git+URL@REF: a clone, because configs/ and constraints.txt are not part of the package
  local url=${1#git+}
  rm -rf "$root/src"
  # Not `clone --branch`, which takes no commit.
  git init --quiet "$root/src"
  git -C "$root/src" fetch --quiet --depth 1 "${url%@*}" "${url##*@}" ||
    fail 74 "cannot fetch $1: check the address and the tag"
  git -C "$root/src" checkout --quiet FETCH_HEAD
  rm -rf "$root/configs"
  cp -R "$root/src/configs" "$root/configs"
  cp "$root/src/launch/constraints.txt" "$root/"
}

# The versions of all that comes along are those of constraints.txt, so that a new VM goes on with what the old one had.
# JAX's own index of libtpu wheels (-f .../libtpu_releases.html) is not needed: PyPI has libtpu for JAX 0.10 and newer.
# `installed` stands for all of it, so that `status` can tell an installation that was interrupted.
install() { # SOURCE [ROWS]
  local place
  case ${1:-} in
    git+*@*) place=$root/src ;;
    *.whl) place=$root/$(basename "$1") ;;
    *) fail 78 "source ${1:-is missing}: give git+https://HOST/REPOSITORY@TAG or a .whl file" ;;
  esac
  mkdir -p "$root"
  exec 9>"$root/install.lock"
  # One whose tpu.sh was interrupted may go on.
  flock --timeout 1800 9 || fail 74 'another installation has not ended for half an hour; try again'
  rm -f "$root/installed"
  [[ $1 == *.whl ]] || fetch_source "$1"
  fetch_uv
  [[ -x $root/venv/bin/python ]] || "$uv" venv --quiet --python "$python_version" "$root/venv" ||
    fail 74 "Python $python_version could not be installed; try again"
  # A new version of a wheel or a branch may carry the same version number, hence --reinstall-package.
  "$uv" pip install --quiet --python "$root/venv/bin/python" --constraint "$root/constraints.txt" \
    --reinstall-package compactlm-jax "compactlm-jax[tpu,gcs] @ file://$place" ||
    fail 74 "$1 could not be installed; see the message above"
  "$uv" pip freeze --python "$root/venv/bin/python" | grep -E '^(compactlm-jax|jax|jaxlib|libtpu)\b' || true
  [[ -z ${2:-} ]] || copy "$2" "$root/data/${2##*/}"
  touch "$root/installed"
}

# The process id alone is not enough: after a reboot another process may have it. Without -ww, ps cuts to $COLUMNS.
running() {
  local pid
  pid=$(cat "$root/supervisor.pid" 2>/dev/null) && ps -ww -o args= -p "$pid" 2>/dev/null | grep -q 'worker.sh supervise'
}

start() { # COMMAND ...
  [[ $# -gt 0 && $* != *$'\n'* ]] || fail 78 'start: give a command, without line breaks'
  if running; then
    [[ $(cat "$root/command") == "$(printf '%s\n' "$@")" ]] || fail 77 "another command runs; stop it first"
    echo 'already running'
    return
  fi
  mkdir -p "$root"
  rm -f "$root/exits" # not supervisor.pid: another supervisor may have written it since the look
  printf '%s\n' "$@" >"$root/command" # a file, because tmux would read some characters of an argument as its own
  if command -v tmux >/dev/null; then
    tmux new-session -d -s compactlm bash "$self" supervise
  else
    setsid nohup bash "$self" supervise </dev/null >/dev/null 2>&1 &
  fi
  for _ in $(seq 100); do
    { running || [[ -s $root/exits ]]; } && echo "started; log: $root/run.log" && return
    sleep 0.1
  done
  fail 70 "the supervisor did not start; try: bash $self supervise"
}

child='' stopping=''

forward() { # the command saves and leaves with 75; it is not restarted here
  stopping=yes
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}

attempt() { # NUMBER COMMAND ...; sets `code`
  local number=$1
  shift
  TZ=UTC printf -- '--- %(%FT%TZ)T attempt %s: %s\n' -1 "$number" "$*"
  code=75
  if [[ -z $stopping ]]; then
    "$@" </dev/null 8<&- &
    child=$!
    [[ -z $stopping ]] || kill -TERM "$child" 2>/dev/null || true # `forward` did not know it yet
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the command ends
      code=0
      wait "$child" || code=$?
    done
    child=''
  fi
  # Not by `date`: bash drops a Ctrl-C that reaches it while a program in the foreground ends well.
  TZ=UTC printf '%(%FT%TZ)T %s %s\n' -1 "$number" "$code" >>"$root/exits"
  TZ=UTC printf -- '--- %(%FT%TZ)T attempt %s ended with %s\n' -1 "$number" "$code"
}

supervise() { # [COMMAND ...]; without one, what `start` was given
  local number=0 storage=0 code=0 rest line
  cd "$root"
  if [[ $# -eq 0 ]]; then
    while IFS= read -r line; do set -- "$@" "$line"; done <"$root/command"
  fi
  exec 9>"$root/supervisor.lock" # from the look at the process id to the writing of it
  flock --timeout 60 9 || fail 74 'another supervisor is starting and has not come to an end; try again'
  # After a reboot the file may hold the process id that this one has now.
  if running && [[ $(cat "$root/supervisor.pid") != "$$" ]]; then fail 77 'another command runs; stop it first'; fi
  export PATH="$root/venv/bin:$PATH"
  rm -f "$root/stop" "$root/silence"
  mkfifo "$root/silence"
  exec 8<>"$root/silence" # nothing is ever written to it: a read of it is a pause
  rm "$root/silence"
  # No programs from here to the first attempt: bash may drop a Ctrl-C that reaches it during one.
  trap forward TERM HUP
  trap 'touch "$root/stop"; forward' INT
  exec >>"$root/run.log" 2>&1
  echo $$ >"$root/supervisor.pid"
  exec 9>&-
  while :; do
    number=$((number + 1))
    attempt "$number" "$@"
    case $code in
      75) rest=$pause ;;
      74) storage=$((storage + 1)) rest=$((pause << (storage - 1))) ;;
      *) break ;;
    esac
    [[ $storage -le 3 ]] || break
    # Not `sleep`: of a Ctrl-C that meets a program, bash may leave it to the program. A second at a time, as a signal just
    # before `read` does not end it.
    while [[ -z $stopping && $((rest--)) -gt 0 ]]; do
      read -r -t 1 -u 8 || true
    done
    [[ -z $stopping ]] || break
  done
  # A signal that `stop` did not send is a shutdown: what it ended is `lost`, and goes on when the machine is back. 143:
  # the command had no handler yet, or ended in the very moment of the signal, when bash does not tell its code.
  [[ -n $stopping && ! -e $root/stop && $code =~ ^(74|75|143)$ ]] ||
    [[ $(cat "$root/supervisor.pid" 2>/dev/null) != "$$" ]] || rm -f "$root/supervisor.pid"
  exit "$code"
}

# One line that tpu.sh reads. `lost`: the supervisor ended before the run, as in a reboot. `bare`: nothing that could run
# is installed. A run that goes on or has a result says so all the same: `tpu.sh watch` must not install under it.
status() {
  local state=absent
  if running; then
    state="running attempt=$(($({ cat "$root/exits" 2>/dev/null || true; } | wc -l) + 1))"
  elif [[ -s $root/supervisor.pid ]]; then
    state=lost
  elif [[ -s $root/exits ]]; then
    state="exited $(tail -n 1 "$root/exits" | cut -d ' ' -f 3)"
  fi
  [[ $state != lost && $state != absent || -e $root/installed ]] || state=bare
  echo "compactlm-status $(hostname) $state"
}

stop() {
  running || { echo 'nothing runs' && return; }
  touch "$root/stop" # tells it from a shutdown
  kill -TERM "$(cat "$root/supervisor.pid")"
  for _ in $(seq "${COMPACTLM_GRACE:-300}"); do
    running || { status && return; }
    sleep 1
  done
  fail 74 'still saving; ask again with status'
}

rsync() { # in a dry run, prints as tpu.sh does
  if [[ -n ${COMPACTLM_DRY_RUN:-} ]]; then
    printf '%s' gcloud
    printf ' %q' storage rsync "$@"
    echo
  else
    gcloud storage rsync "$@" || fail 74 'gcloud storage failed; run the same command again, it copies what is missing'
  fi
}

# Half-written checkpoints and locks (nested runs have their own) stay behind; gcloud matches from the start of a path.
# In a bucket a checkpoint counts from the moment that its commit file is there: commit files go last, when all else has
# arrived.
copy() { # SOURCE TARGET
  local marker='commit_success\.txt' others='.*\.orbax-checkpoint-tmp.*|(^|.*/)lock$'
  if [[ $1 == gs://* && $2 != gs://* ]]; then
    [[ -n ${COMPACTLM_DRY_RUN:-} ]] || mkdir -p "$2"
    rsync "$1" "$2" --recursive "--exclude=$others"
  elif [[ $1 != gs://* && $2 == gs://* ]]; then
    [[ -d $1 ]] || fail 78 "there is no folder $1"
    rsync "$1" "$2" --recursive "--exclude=$others|.*$marker\$"
    rsync "$1" "$2" --recursive "--exclude=$others"
  else
    fail 78 'copy: one of SOURCE and TARGET is a folder, the other gs://BUCKET/...'
  fi
}

verb=${1:-}
[[ $# -eq 0 ]] || shift
case $verb in
  install | start | supervise | status | stop | copy) "$verb" "$@" ;;
  *) fail 78 'usage: worker.sh install SOURCE | start COMMAND ... | supervise COMMAND ... | status | stop | copy FROM TO' ;;
esac
