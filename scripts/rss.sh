#!/usr/bin/env bash
# Resident memory of the agents, the median: of the cluster that runs, or of one that is started for it. With SERVICES=n, also
# with n services of three endpoints each besides.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=target/release/sluice
started=
if ! pgrep -x sluice-agent >/dev/null; then
  $bin up
  started=1
fi
cleanup() { [ -z "$started" ] || $bin down; }
trap cleanup EXIT

# Until it has been the same for as long as agents take to give back what a view took (10 s): two minutes at most.
settle() {
  local last= same=0 now
  for _ in $(seq 120); do
    now=$(for p in $(pgrep -x sluice-agent); do awk '/VmRSS/ {printf "%d ", $2 / 1024}' "/proc/$p/status"; done)
    if [ "$now" = "$last" ]; then same=$((same + 1)); else same=0; fi
    [ "$same" -lt 12 ] || return 0
    last=$now
    sleep 1
  done
}

median() {
  settle
  for p in $(pgrep -x sluice-agent); do awk '/VmRSS/ {print $2 / 1024}' "/proc/$p/status"; done | sort -n |
    awk -v name="$1" '{ a[NR] = $1 } END { printf "RESULT %s ours=%.1f peer=0 unit=MB\n", name, a[int((NR + 1) / 2)] }'
}

median agent_rss_mb
if [ "${SERVICES:-0}" -gt 0 ]; then
  kubectl() { command kubectl --context sluice "$@"; }
  kubectl create namespace many
  awk -v many="$SERVICES" 'BEGIN {
    printf "{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": ["
    for (n = 0; n < many; n++) {
      printf "%s{\"apiVersion\": \"v1\", \"kind\": \"Service\", \"metadata\": {\"name\": \"s%d\", \"namespace\": \"many\"},", n ? ", " : "", n
      printf "\"spec\": {\"ports\": [{\"port\": 80}]}}, {\"apiVersion\": \"discovery.k8s.io/v1\", \"kind\": \"EndpointSlice\","
      printf "\"metadata\": {\"name\": \"s%d\", \"namespace\": \"many\", \"labels\": {\"kubernetes.io/service-name\": \"s%d\"}},", n, n
      printf "\"addressType\": \"IPv4\", \"ports\": [{\"name\": \"\", \"port\": 8080, \"protocol\": \"TCP\"}], \"endpoints\": ["
      for (e = 0; e < 3; e++)
        printf "%s{\"addresses\": [\"10.%d.%d.%d\"], \"conditions\": {\"ready\": true}}", e ? ", " : "", 200 + e, n / 250, n % 250 + 1
      printf "]}"
    }
    print "]}"
  }' | kubectl create --validate=false -f - >/dev/null
  median "agent_rss_${SERVICES}_services_mb"
  kubectl delete namespace many >/dev/null
fi
