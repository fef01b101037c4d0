# shellcheck shell=bash disable=SC2034 # the scripts that source this file use what it sets
# What up, down, tools, component, e2e and bench share: names, places, and how a process is
# told from another that took over its number.

shopt -s inherit_errexit # a failure inside $( ) counts, too

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${KUBE_TUNNEL_CLUSTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kube-tunnel-cluster}
state=${KUBE_TUNNEL_CLUSTER_STATE:-/var/tmp/kube-tunnel-cluster}
state=$(realpath -m "$state")

# Fixed and uncommon, so that a kubeconfig stays good over a restart. One cluster at a time.
api_port=16443
etcd_port=16379
etcd_peer_port=16380
kubelet_port=16250
kubelet_health_port=16248
bridge=kubetunnel0
node_name=kube-tunnel-node
node_ip=10.213.0.1 # not loopback: the kubelet refuses that
pod_range=10.213.0.0/24
service_range=10.96.0.0/16
cgroup=kube-tunnel-cluster

kubeconfig=$state/kubeconfig
server_image=kube-tunnel-test/server:dev pause_image=kube-tunnel-test/pause:dev
# In the order they start in; "node" is the first process of the others' namespaces.
components=(etcd kube-apiserver containerd kube-controller-manager kube-scheduler kubelet)

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# until_true SECONDS WHAT COMMAND...: polls; the last failure's words are in the logs.
until_true() {
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS > deadline)); then
      say "error: waited in vain for $what; see $state/logs"
      return 1
    fi
    sleep 0.2
  done
}

# One up or down at a time. Everything started later must not inherit descriptor 9.
lock() {
  mkdir -p "$cache"
  exec 9>"$cache/lock"
  flock -w 1800 9 || die "another up or down holds $cache/lock"
}

# When a process started, in clock ticks since boot: with its number, its identity.
start_time() {
  local stat
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  stat=${stat##*) } # the name before may hold spaces
  read -ra stat <<<"$stat"
  [[ ${stat[0]} != Z ]] && echo "${stat[19]}"
}

# pid_of NAME: the process started under that name, if it still is that process.
pid_of() {
  local pid started
  { read -r pid started <"$state/pids/$1"; } 2>/dev/null || return 1
  [[ $(start_time "$pid") == "$started" ]] && echo "$pid"
}

not_running() { ! pid_of "$1"; }

# Refuses a folder that is not ours: down deletes it as a whole.
check_state_folder() {
  case $state/ in
    /run/* | /var/run/* | /var/log/* | /var/lib/* | /proc/* | /sys/*)
      die "KUBE_TUNNEL_CLUSTER_STATE must not be under /run, /var/log or /var/lib: the node has its own" ;;
  esac
  [[ ! -e $state || -e $state/.kube-tunnel-cluster || -z $(ls -A "$state") ]] ||
    die "$state holds something else than a test cluster"
}

# install_missing COMMAND:PACKAGE...: Debian's packages of the commands that are not there.
install_missing() {
  local pair missing=()
  for pair; do
    command -v "${pair%:*}" >/dev/null || missing+=("${pair##*:}")
  done
  ((${#missing[@]} == 0)) || apt_install "${missing[@]}"
}

apt_install() {
  say "installing $* ..."
  apt_get install "$@" >&2 || { apt_get update && apt_get install "$@"; } >&2 || die "install $* by hand"
}

apt_get() {
  DEBIAN_FRONTEND=noninteractive apt-get "$1" -y -q --no-install-recommends "${@:2}" </dev/null
}
