# shellcheck shell=bash disable=SC2154 # lib.sh and up set the variables
# The node: its namespaces, and one script per component under STATE/components, which
# says all of how that component runs and can start it again.

make_bridge() {
  ip link add "$bridge" type bridge
  ip address add "$node_ip/24" dev "$bridge"
  ip link set "$bridge" up
}

# The kubelet wants its root group there, in every hierarchy of cgroup v1 or in the one of v2.
make_cgroups() {
  local procs
  for procs in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs; do
    [[ $procs == */cgroup/cgroup.procs || ! -e /sys/fs/cgroup/cgroup.procs ]] || continue
    [[ ! -e $procs ]] || mkdir -p "${procs%/*}/$cgroup"
  done
}

start_node() {
  setsid unshare --mount --propagation private --pid --fork --kill-child \
    "$here/node-init" "$state" </dev/null >"$state/logs/node" 2>&1 9>&- &
  until_true 10 "the node's namespaces" pid_of node
}

# define NAME [VAR=value...] COMMAND...: with no more of the environment than stands there,
# as a proxy setting of this shell must not come between the components.
define() {
  {
    echo '#!/usr/bin/env bash'
    printf 'exec env -i HOME=/root PATH=%q' "$PATH"
    printf ' %q' "${@:2}"
    echo
  } >"$state/components/$1"
  chmod +x "$state/components/$1"
}

# start NAME: in the node's namespaces, detached from this terminal and its descriptors.
start() {
  # shellcheck disable=SC2016 # expands inside
  nsenter --target "$(pid_of node)" --mount --pid -- bash -c '
    cd "$0"
    (
      read -r pid rest <"hostproc/self/stat"
      read -ra rest <<<"${rest##*) }"
      echo "$pid ${rest[19]}" >"pids/$1"
      exec setsid "./components/$1" </dev/null >>"logs/$1" 2>&1
    ) &' "$state" "$1" 9>&-
}

# gates_for COMPONENT: those of --feature-gates that it offers. Some are known to one
# component only, and the others would refuse to start.
gates_for() {
  local gate mine=()
  for gate in ${feature_gates//,/ }; do
    if offers_gate "$1" "${gate%=*}"; then mine+=("$gate"); fi
  done
  ((${#mine[@]} == 0)) || (IFS=, && echo "--feature-gates=${mine[*]}")
}

offers_gate() { "$kubernetes/$1" --help 2>/dev/null | grep -E "(kube:|^ *)$2=true\\|false" >/dev/null; }

# A typing error, or a gate that is no longer a choice, is better told now than in a log.
check_gates() {
  local gate component
  for gate in ${feature_gates//,/ }; do
    for component in kube-apiserver kube-controller-manager kube-scheduler kubelet; do
      ! offers_gate "$component" "${gate%=*}" || continue 2
    done
    die "no component of Kubernetes $kubernetes_version offers the feature gate ${gate%=*}"
  done
}

# define_components KUBERNETES ETCD: the folders of their binaries.
define_components() {
  local kubernetes=$1 etcd=$2 pki=$state/pki component
  local -A gates
  for component in kube-apiserver kube-controller-manager kube-scheduler kubelet; do
    gates[$component]=$(gates_for "$component")
  done

  define etcd GOGC=50 "$etcd/etcd" --name=test --data-dir="$state/etcd" --unsafe-no-fsync --log-level=warn \
    --listen-client-urls="http://127.0.0.1:$etcd_port" --advertise-client-urls="http://127.0.0.1:$etcd_port" \
    --listen-peer-urls="http://127.0.0.1:$etcd_peer_port" --initial-advertise-peer-urls="http://127.0.0.1:$etcd_peer_port" \
    --initial-cluster="test=http://127.0.0.1:$etcd_peer_port"

  # No endpoint reconciler: it would want an address for pods to reach, and refuses loopback.
  define kube-apiserver "$kubernetes/kube-apiserver" ${gates[kube-apiserver]:+"${gates[kube-apiserver]}"} \
    --etcd-servers="http://127.0.0.1:$etcd_port" --bind-address=127.0.0.1 --secure-port="$api_port" \
    --advertise-address="$node_ip" --endpoint-reconciler-type=none --service-cluster-ip-range="$service_range" \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --profiling=false \
    --client-ca-file="$pki/ca.crt" --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
    --kubelet-certificate-authority="$pki/ca.crt" --kubelet-client-certificate="$pki/apiserver-to-kubelet.crt" \
    --kubelet-client-key="$pki/apiserver-to-kubelet.key" --kubelet-preferred-address-types=InternalIP \
    --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$pki/service-account.pub" \
    --service-account-signing-key-file="$pki/service-account.key"

  # Only those that tests see the work of: each of the others holds a copy of its objects.
  local controllers=(deployment replicaset statefulset daemonset job endpoints endpointslice serviceaccount
    root-ca-certificate-publisher namespace garbage-collector pod-garbage-collector node-lifecycle
    taint-eviction disruption clusterrole-aggregation)
  # A node is waited for longer than an API server that says goodbye is away: else its pods count as not ready after that, now
  # and then, depending on who of the two is heard first.
  define kube-controller-manager GOGC=50 "$kubernetes/kube-controller-manager" ${gates[kube-controller-manager]:+"${gates[kube-controller-manager]}"} \
    --kubeconfig="$state/kube-controller-manager.kubeconfig" --leader-elect=false --secure-port=0 \
    --node-monitor-grace-period=5m --use-service-account-credentials=true --root-ca-file="$pki/ca.crt" \
    --service-account-private-key-file="$pki/service-account.key" \
    --controllers="$(IFS=, && echo "${controllers[*]/%/-controller}")"

  define kube-scheduler GOGC=50 "$kubernetes/kube-scheduler" ${gates[kube-scheduler]:+"${gates[kube-scheduler]}"} \
    --kubeconfig="$state/kube-scheduler.kubeconfig" --leader-elect=false --secure-port=0

  # The shim and runc are looked for on PATH: those beside the chosen containerd come first.
  define containerd PATH="$(dirname "$containerd"):$PATH" "$containerd" --config "$state/containerd.toml"

  define kubelet "$kubernetes/kubelet" ${gates[kubelet]:+"${gates[kubelet]}"} --config="$state/kubelet.yaml" \
    --kubeconfig="$state/kubelet.kubeconfig" --hostname-override="$node_name" --node-ip="$node_ip"
}
