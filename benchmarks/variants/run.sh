#!/usr/bin/env bash
# run.sh LIMIT_SECONDS [--tiny] [--only NAME,NAME]: measure the variants of the SSD; JSON to $OUT/ssd.json.
set -u
limit=${1:?run.sh LIMIT_SECONDS}
case $limit in (*[!0-9]*|'') echo "LIMIT_SECONDS must be a number" >&2; exit 2;; esac
shift
cd "$(dirname "$0")/../.."
: "${OUT:=/tmp}"
export OUT PYTHONPATH=src
exec timeout -k 5 "$limit" python3 benchmarks/variants/measure.py --limit "$limit" --out "$OUT/ssd.json" "$@"
