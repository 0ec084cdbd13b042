# The flags of tpu.sh, and how it speaks to gcloud and to you. Sourced, not run.
# shellcheck shell=bash disable=SC2034 # tpu.sh uses the variables

name=${LAUNCH_NAME:-} zone=${LAUNCH_ZONE:-} project=${LAUNCH_PROJECT:-}
type='' version='' spot='' queued='' valid_until='' source='' data='' worker=0 recreate='' attempts=10 poll=60
dry_run='' yes='' on_vm=''

fail() { # CODE MESSAGE
  echo "tpu.sh: $2" >&2
  exit "$1"
}

say() {
  echo "$(date -u +%FT%TZ) $*" >&2
}

# The words as one line that a shell reads back.
shown() {
  local word line='' quote="'\\''"
  for word; do
    [[ $word =~ ^[-A-Za-z0-9_./:=@%+,]+$ ]] || word="'${word//\'/$quote}'"
    line="$line $word"
  done
  echo "${line# }"
}

set_flag() { # --FLAG=VALUE
  local flag=${1%%=*}
  case $1 in
    --name=?* | --zone=?* | --project=?* | --type=?* | --version=?* | --valid_until=?* | --source=?* | --data=?* | \
      --worker=?* | --attempts=?* | --poll=?*) printf -v "${flag#--}" '%s' "${1#*=}" ;;
    --spot | --queued | --recreate | --dry_run | --yes | --on_vm) printf -v "${1#--}" yes ;;
    *) fail 78 "unknown or empty flag $1; the flags stand at the top of launch/tpu.sh (--flag=value)" ;;
  esac
}

check() { # WHAT VALUE REGEX EXAMPLE
  [[ $2 =~ ^($3)$ ]] || fail 78 "--$1=$2 is missing or not valid; for example --$1=$4"
}

check_flags() {
  check name "$name" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' convbert
  check zone "$zone" '[a-z]+(-[a-z]+)*[0-9]+-[a-z0-9]+' us-central1-a
  check project "$project" '[a-z][-a-z0-9.:]{2,}' my-project-123456
  type=${type/#v5e-/v5litepod-} # what `compactlm plan` calls it
  check type "$type" '(v[0-9]+[a-z]*-[0-9]+)?' v3-8
  check version "$version" '[-.a-z0-9]*' tpu-ubuntu2204-base
  check valid_until "$valid_until" '([0-9]+[smhd])*' 6h
  check data "$data" '(gs://[-a-z0-9_.]+/[^[:cntrl:]]*[^/])?' gs://my-bucket/data/pairs
  check worker "$worker" '[0-9]+|all' 0
  check attempts "$attempts" '[0-9]+' 10
  check poll "$poll" '[0-9.]+' 60
}

need_command() {
  [[ $# -gt 0 && $* != *$'\n'* ]] || fail 78 'give the command after --, without line breaks: -- compactlm train ...'
}

# Every gcloud command passes here. --quiet: nothing may wait for an answer at night; deleting asks by itself.
tpus() { # KIND VERB NAME ...
  set -- gcloud compute tpus "$@" "--zone=$zone" "--project=$project" --quiet
  if [[ -z $dry_run ]]; then "$@"; else shown "$@" >&3; fi
}

remote() { # WORKERS COMMAND ...; each argument arrives as it is
  local workers=$1 line
  shift
  line=$(shown "$@")
  tpus tpu-vm ssh "$name" "--worker=$workers" "--command=$line"
}

unreachable() {
  fail 74 "the command failed on a worker of $name, or ssh to it (see above)"
}
