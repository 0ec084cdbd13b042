#!/usr/bin/env bash
# Prints launch/gke-jobset.yaml with its values filled in; pipe it to `kubectl apply -f -`.
#
#   gke.sh --name=convbert --image=IMAGE@sha256:... --accelerator=tpu-v5-lite-podslice --topology=2x4 --chips=8 \
#     [--hosts=1] [--service_account=default] [--spot] -- train --config=configs/convbert.py:small ...
#
# --chips: chips of one VM, --hosts: VMs of the slice; the table "Plan TPUs in GKE" has both for every topology.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name='' image='' accelerator='' topology='' chips='' hosts=1 service_account=default spot=''

fail() { # MESSAGE
  echo "gke.sh: $1" >&2
  exit 78
}

check() { # FLAG VALUE REGEX; nothing that passes means anything to sed or YAML
  [[ $2 =~ ^($3)$ ]] || fail "--$1=$2 is missing or not valid; see the top of launch/gke.sh"
}

while [[ $# -gt 0 && $1 != -- ]]; do
  flag=${1%%=*}
  case $1 in
    --name=* | --image=* | --accelerator=* | --topology=* | --chips=* | --hosts=* | --service_account=*)
      printf -v "${flag#--}" '%s' "${1#*=}"
      ;;
    --spot) spot=yes ;;
    *) fail "unknown flag $1; see the top of launch/gke.sh" ;;
  esac
  shift
done
[[ $# -gt 1 ]] || fail 'give the arguments of compactlm after --: -- train --config=... --workdir=gs://...'
shift

check name "$name" '[a-z]([-a-z0-9]{0,40}[a-z0-9])?'
check image "$image" '[a-z0-9][-a-zA-Z0-9._/:@]*'
check accelerator "$accelerator" 'tpu[-a-z0-9]*'
check topology "$topology" '[0-9]+x[0-9]+(x[0-9]+)?'
check chips "$chips" '[1-9][0-9]*'
check hosts "$hosts" '[1-9][0-9]*'
check service_account "$service_account" '[a-z0-9][-a-z0-9.]*'

args='' # a YAML list of single-quoted strings, in which only the quote itself is special
quote="''"
for word; do
  [[ $word != *[[:cntrl:]]* ]] || fail 'no line breaks or control characters in the arguments'
  args="$args, '${word//\'/$quote}'"
done
args=$(printf '%s' "[${args#, }]" | sed 's/[\\&|]/\\&/g') # for the right side of sed's s

sed -e '/^#/d' ${spot:+-e 's/#SPOT //'} -e '/#SPOT/d' \
  -e "s|\${NAME}|$name|" -e "s|\${IMAGE}|$image|" -e "s|\${ACCELERATOR}|$accelerator|" \
  -e "s|\${TOPOLOGY}|$topology|" -e "s|\${CHIPS}|$chips|" -e "s|\${HOSTS}|$hosts|" \
  -e "s|\${SERVICE_ACCOUNT}|$service_account|" -e "s|\${ARGS}|$args|" "$here/gke-jobset.yaml"
