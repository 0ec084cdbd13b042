#!/usr/bin/env bash
# One command for runs on Cloud TPU VMs; launch/README.md is its page. Flags as --flag=value, the run's command after --.
#
#   tpu.sh create   make the VM, or reuse the one of that name      --type=v3-8 [--spot] [--queued [--valid_until=6h]]
#   tpu.sh install  the package on all workers                      --source=git+https://HOST/REPOSITORY@TAG | FILE.whl
#                   and rows: in data/NAME, where the run starts    [--data=gs://BUCKET/.../NAME]
#   tpu.sh run      start in a detached terminal on all workers     -- compactlm train ...
#   tpu.sh watch    wait for the end; restart what a preemption or a reboot ended (a new VM only with --recreate or
#                   --queued, then with the flags of create and install too)                     -- compactlm train ...
#   tpu.sh logs     follow (Ctrl-C leaves the run alone)            [--worker=0|all]
#   tpu.sh status | stop (save and end the run; the VM stays, and costs) | delete (asks, unless --yes)
#   tpu.sh copy     a run directory to or from a bucket             SOURCE TARGET [--on_vm [--worker=all]]
#
# Always: --name= --zone= --project= (or LAUNCH_NAME, LAUNCH_ZONE, LAUNCH_PROJECT). --dry_run prints the gcloud commands
# (of watch: all that it may come to) and runs none. Exit codes: 0 done, 74 the cloud failed, 75 preempted, 78 a flag or
# a mismatch; watch: the run's own.
#
# Runs with bash 3.2 (macOS). No function relies on `set -e`, which is off inside a condition.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=SCRIPTDIR/flags.sh
source "$here/flags.sh"
# shellcheck source=SCRIPTDIR/watch.sh
source "$here/watch.sh"
exec 3>&1 # dry runs print here, also from inside $(...)
scratch=$(mktemp)
trap 'rm -f "$scratch"' EXIT

# Prints what gcloud tells, or NOT_FOUND. Only that very answer counts as absent: a lost network must not lead to a
# second VM.
describe() { # KIND FORMAT ASSUMED_IN_A_DRY_RUN
  if tpus "$1" describe "$name" "--format=$2" 2>"$scratch"; then
    [[ -z $dry_run ]] || echo "$3"
  elif grep -q NOT_FOUND "$scratch"; then
    echo NOT_FOUND
  else
    cat "$scratch" >&2
    fail 74 "cannot ask for the state of $name. Is \`gcloud auth login\` done, and the Cloud TPU API enabled?"
  fi
}

vm_info() { # ASSUMED
  describe tpu-vm 'value(state,acceleratorType.basename(),runtimeVersion)' "$1"
}

queue_info() { # ASSUMED
  local node='tpu.nodeSpec[0].node'
  describe queued-resources "value(state.state,$node.acceleratorType.basename(),$node.runtimeVersion)" "$1"
}

same_machine() { # STATE TYPE VERSION, as found
  [[ $2 == "$type" && $3 == "$version" ]] ||
    fail 78 "$name exists as $2 with $3, not $type with $version: take another --name, or delete it first"
}

default_version() { # of the TPU software, https://cloud.google.com/tpu/docs/runtimes
  case $type in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail 78 "--type=$type: which --version=? And is it a type, such as v3-8?" ;;
  esac
}

create() {
  local info
  [[ -n $version ]] || version=$(default_version) || exit
  info=$(vm_info NOT_FOUND) || exit
  case $info in
    NOT_FOUND)
      [[ -z $queued ]] || { create_queued && return; }
      tpus tpu-vm create "$name" "--accelerator-type=$type" "--version=$version" ${spot:+--spot} ||
        fail 74 "not created (see above). Quota: launch/README.md; no capacity: another zone, --spot or --queued"
      return
      ;;
    PREEMPTED* | TERMINATED*) fail 75 "$name is $info and cannot come back: delete it, then create it again" ;;
  esac
  # shellcheck disable=SC2086 # three words
  same_machine $info
  case $info in
    READY*) say "reusing $name" ;;
    STOPPED*) tpus tpu-vm start "$name" || fail 74 "$name could not be started" ;;
    *) fail 74 "$name exists and is $info: try again in a minute" ;;
  esac
}

# The request has the name of its VM, so that it is found again and never made twice.
create_queued() {
  local info
  info=$(queue_info NOT_FOUND) || exit
  if [[ $info == NOT_FOUND ]]; then
    tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" \
      ${spot:+--spot} ${valid_until:+"--valid-until-duration=$valid_until"} ||
      fail 74 "the request was refused (see above). Quota: launch/README.md"
  else
    # shellcheck disable=SC2086 # three words
    same_machine $info
  fi
  while :; do
    info=$(queue_info ACTIVE) || exit
    case $info in
      ACTIVE*) return ;;
      FAILED* | SUSPEND* | DELETING* | NOT_FOUND) fail 74 "the request is $info: delete it, then create it again" ;;
    esac
    say "$name: $info (Ctrl-C is harmless: create again waits on for the same request)"
    sleep "$poll"
  done
}

ready() {
  local info
  info=$(vm_info READY) || exit
  case $info in
    READY*) ;;
    NOT_FOUND) fail 78 "there is no $name in $zone: create it first" ;;
    PREEMPTED* | TERMINATED*) fail 75 "$name is $info: delete it, then create, install and run again" ;;
    *) fail 74 "$name is $info: try again in a minute" ;;
  esac
}

install() {
  local files
  case $source in
    git+*://*@*/*@*) fail 78 '--source: no user or password in the address, it would be shown' ;;
    git+*://*@*) files=("$here/worker.sh") ;;
    *.whl)
      [[ -f $source ]] || fail 78 "--source: there is no file $source"
      # These two are not part of the package; with a tag they come from its clone.
      files=("$here/worker.sh" "$source" "$here/constraints.txt" "$here/../configs")
      ;;
    *) fail 78 '--source= git+https://HOST/REPOSITORY@TAG, or a .whl file' ;;
  esac
  ready
  remote all mkdir -p compactlm || unreachable
  tpus tpu-vm scp --recurse "${files[@]}" "$name:compactlm/" --worker=all || unreachable
  remote all bash compactlm/worker.sh install "$source" ${data:+"$data"} || unreachable
}

run() { # COMMAND ...
  need_command "$@"
  ready
  remote all bash compactlm/worker.sh start "$@" || unreachable
}

logs() {
  local lost=0
  ready
  until remote "$worker" tail -n 100 -F compactlm/run.log; do
    lost=$((lost + 1))
    [[ $lost -lt 5 ]] || unreachable
    say "ssh to $name was lost; connecting again"
    sleep "$poll"
  done
}

# Also where nothing is installed yet, as a command that fails looks like lost ssh.
ask_workers() { # status | stop
  # shellcheck disable=SC2016 # for the worker's shell
  local ask='f=compactlm/worker.sh; if [ -f $f ]; then bash $f "$0"; else echo "compactlm-status $(hostname) bare"; fi'
  remote all bash -c "$ask" "$1"
}

status() {
  local vm request
  vm=$(vm_info READY) || exit
  request=$(queue_info ACTIVE) || exit
  echo "$name: $vm; queued request: $request"
  [[ $vm != READY* ]] || ask_workers status || unreachable
}

stop() {
  ready
  ask_workers stop || unreachable
  say "the VM is still there and costs; \`delete\` ends that"
}

# A request goes with its VM; a VM without a request goes alone. Looks for both, whatever the flags: what stays, costs.
remove() {
  local request vm
  request=$(queue_info "$([[ -n $queued ]] && echo ACTIVE || echo NOT_FOUND)") || exit
  vm=$(vm_info READY) || exit
  case "$request $vm" in
    'NOT_FOUND NOT_FOUND') say "there is no $name in $zone" ;;
    NOT_FOUND*) tpus tpu-vm delete "$name" ;;
    *) tpus queued-resources delete "$name" --force ;;
  esac || fail 74 "$name was not deleted (see above)"
}

delete() {
  local answer=''
  if [[ -z $yes && -z $dry_run ]]; then
    printf 'Delete the TPU VM %s (%s, project %s) with its disk? [y/N] ' "$name" "$zone" "$project" >&2
    read -r answer || fail 78 'no answer; without a terminal, pass --yes'
    [[ $answer == [yY] || $answer == [yY][eE][sS] ]] || { say 'kept' && return; }
  fi
  remove
}

copy() { # SOURCE TARGET
  [[ $# -eq 2 ]] || fail 78 'copy SOURCE TARGET: a folder and gs://BUCKET/..., in either order'
  if [[ -z $on_vm ]]; then
    COMPACTLM_DRY_RUN=$dry_run bash "$here/worker.sh" copy "$@"
  else
    ready
    remote "$worker" env -C compactlm bash worker.sh copy "$@" || unreachable # paths as the run sees them
  fi
}

main() {
  local verb=${1:-} words=()
  [[ $# -eq 0 ]] || shift
  while [[ $# -gt 0 && $1 != -- ]]; do
    if [[ $1 == -* ]]; then set_flag "$1"; else words+=("$1"); fi
    shift
  done
  [[ $# -eq 0 ]] || shift
  set -- ${words[@]+"${words[@]}"} "$@"
  case $verb in
    create | install | logs | status | stop | delete) [[ $# -eq 0 ]] || fail 78 "$verb takes flags only, not $1" ;;
    run | watch | copy) ;;
    *)
      sed -n '3,/^# Runs with/ s/^# \{0,1\}//p' "$here/tpu.sh" | sed '$d' >&2
      exit 78
      ;;
  esac
  [[ $verb == copy && -z $on_vm ]] || check_flags
  [[ -n $dry_run ]] || command -v gcloud >/dev/null ||
    fail 78 'gcloud is not on PATH: install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)'
  "$verb" "$@"
}

main "$@"
