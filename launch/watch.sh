# How tpu.sh waits for the end of a run, and mends what ended it early. Sourced, not run.
# shellcheck shell=bash disable=SC2154 # flags.sh has the variables, tpu.sh the other verbs

replacing='' # a machine that is gone, and the run is not started again yet

# Sets `verdict` to bare, lost, the exit code of the run, or nothing while it runs; fails if ssh does. `unfit` is what
# ails a worker that ended for good or has no whole installation. The others wait for it, or restart for ever: at the
# second look they are stopped.
observe() {
  local lines before=$unfit
  lines=$(ask_workers status) || return
  lines=$(grep '^compactlm-status ' <<<"$lines") || return
  say "$lines"
  unfit=$(awk '$3 == "exited" && $4 != 0 && $4 != 75 { print $4; exit }' <<<"$lines")
  if [[ -z $unfit ]] && grep -q ' bare$' <<<"$lines"; then
    [[ -n $recreate$queued ]] ||
      fail 78 "nothing is installed on $name, or not all: \`tpu.sh install\` and \`run\`, or watch with --recreate"
    unfit=bare
  fi
  if [[ -n $unfit ]]; then
    if grep -q ' running ' <<<"$lines"; then
      [[ -n $before ]] || return 0
      say "one worker: $unfit; stopping the others"
      ask_workers stop >&2 || return
    fi
    verdict=$unfit
  elif grep -Eq ' (lost|absent)$' <<<"$lines"; then
    verdict=lost
  elif ! grep -q ' running ' <<<"$lines"; then # 75 if one was stopped
    verdict=$(awk '$4 { code = $4 } END { print code + 0 }' <<<"$lines")
  fi
}

# Removes what a preemption leaves behind, and nothing that lives or waits in a queue.
clear_lost() { # VM_INFO
  local request
  request=$(queue_info NOT_FOUND) || exit
  case "$1 $request" in
    READY*) ;;
    PREEMPTED* | TERMINATED* | *' FAILED'* | *' SUSPENDED'*) remove ;;
  esac
}

# A dry run cannot know what watch will hear, so it prints all that may follow, once.
rehearse() { # COMMAND ...
  echo "# every $poll seconds:" >&3
  vm_info READY >/dev/null
  ask_workers status
  echo '# when a worker was rebooted:' >&3
  run "$@"
  echo '# when one worker ended for good and others run:' >&3
  ask_workers stop
  [[ -n $recreate$queued ]] || return 0
  echo '# when the VM was preempted (without the deletion: when there is none):' >&3
  clear_lost PREEMPTED
  create
  echo '# and then, or when an installation was interrupted (--steal_lock only after a preemption):' >&3
  install
  [[ "$1 ${2:-}" != 'compactlm train' || ${!#} == --steal_lock ]] || set -- "$@" --steal_lock
  run "$@"
}

at_exit() {
  rm -f "$scratch"
  [[ -z $replacing ]] || say "$name was being replaced. When you start this again, end the command with --steal_lock:" \
    "the lock in the run directory still names the machine that is gone"
}

watch() { # COMMAND ...
  local info made=0 unheard=0 verdict unfit='' known=''
  need_command "$@"
  [[ -z $recreate$queued || -n $source && -n $type ]] || fail 78 'a new VM also needs --type= and --source='
  [[ -z $dry_run ]] || { rehearse "$@" && return; }
  trap at_exit EXIT
  while :; do
    verdict='' info=$(vm_info READY) || info=UNKNOWN
    case $info in
      READY*)
        observe || info=UNKNOWN
        [[ $verdict == bare ]] || known=yes
        ;;
      PREEMPTED* | TERMINATED*) known=yes verdict=gone ;;
      NOT_FOUND) verdict=gone ;;
    esac
    if [[ $info == UNKNOWN ]]; then unheard=$((unheard + 1)); else unheard=0; fi
    [[ $unheard -lt 20 ]] || fail 74 "$name did not answer $unheard times; it may still run: look with status"
    [[ $verdict != [0-9]* ]] || return "$verdict"
    if [[ -n $verdict ]]; then
      [[ $verdict != gone || -n $recreate$queued ]] || fail 75 "$name is $info: start anew, or watch with --recreate"
      made=$((made + 1)) unfit=''
      [[ $made -le $attempts ]] || fail 75 "$name was lost more than $attempts times"
      say "$name: $verdict ($info); start $made of $attempts"
      if [[ $verdict == gone && -n $known && "$1 ${2:-}" == 'compactlm train' ]]; then
        # The lock in the run directory names the old host, which is gone for certain.
        [[ ${!#} == --steal_lock ]] || set -- "$@" --steal_lock
        replacing=yes
      fi
      # What fails is looked at again after the pause.
      if mend "$verdict" "$info" "$@"; then replacing=''; fi
    fi
    sleep "$poll"
  done
}

mend() ( # gone|bare|lost VM_INFO COMMAND ...; in a subshell, as its parts exit where they fail
  [[ $1 != gone ]] || { clear_lost "$2" && create; } || exit
  [[ $1 == lost ]] || install || exit
  shift 2
  run "$@"
)
