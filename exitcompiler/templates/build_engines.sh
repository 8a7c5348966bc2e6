#!/usr/bin/env bash
# Builds the TensorRT engines of a compiled program, on the GPU that is to run them.
#
#   ./build.sh [TRTEXEC [FLAG ...]]
#
# TRTEXEC is the program trtexec of TensorRT 10 or 11 (default: the one on the PATH); further flags are
# passed on to it, which runs in this folder. An engine appears whole or not at all; what trtexec says is in
# the .log beside it. device.txt is written last: without it the runtime takes no engine of the folder.
set -euo pipefail

trtexec=${1:-trtexec}
if [[ $trtexec == */* && $trtexec != /* ]]; then
  trtexec=$PWD/$trtexec
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
extra=("${@:2}")
flags=(--skipInference --maxAuxStreams=0 --timingCacheFile=timing.cache)

die() {
  printf 'build.sh: %s\n' "$*" >&2
  exit 1
}

command -v -- "$trtexec" >/dev/null || die "there is no $trtexec: give its path, as in ./build.sh /opt/tensorrt/bin/trtexec"
help=$("$trtexec" --help 2>&1 || true)
[[ $help =~ TensorRT\ v([0-9]+) ]] || die "$trtexec does not say which TensorRT it is of"
version=${BASH_REMATCH[1]}  # 101600 is 10.16.0; before 10 it had four digits
((version >= 100000)) || die "$trtexec is of a TensorRT before 10"

# The models say what is computed in which type. In 10 that has to be asked for; from 11 on it is always so.
if ((version < 110000)); then
  [[ $help == *--stronglyTyped* ]] || die "$trtexec has no --stronglyTyped: TensorRT 10.1 or later is needed"
  flags+=(--stronglyTyped)
fi
# float32 means float32, not 10 bits of it.
if [[ $help == *--noTF32* ]]; then
  flags+=(--noTF32)
fi

trap 'rm -f -- *.plan.new' EXIT
rm -f -- device.txt

build() {
  local name=$1
  shift
  printf 'building %s.plan\n' "$name"
  if ! "$trtexec" --onnx="$name.onnx" --saveEngine="$name.plan.new" "${flags[@]}" "$@" \
    ${extra[@]+"${extra[@]}"} >"$name.log" 2>&1 || [[ ! -s $name.plan.new ]]; then
    tail -n 20 -- "$name.log" >&2
    die "$name.plan was not built; all that trtexec said is in $name.log"
  fi
  mv -f -- "$name.plan.new" "$name.plan"
}

@BUILDS@

# The runtime compares this with the device that it finds.
device=$(sed -n 's/.*Selected Device: *//p' -- @LAST_LOG@ | head -n 1)
capability=$(sed -n 's/.*Compute Capability: *//p' -- @LAST_LOG@ | head -n 1)
[[ -n $device && -n $capability ]] || die "$trtexec built the engines, but does not say for which device: \
write its name and its compute capability to device.txt, a line each, as nvidia-smi \
--query-gpu=name,compute_cap --format=csv,noheader tells them"
printf '%s\n%s\n' "$device" "$capability" >device.txt
