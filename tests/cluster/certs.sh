# shellcheck shell=bash disable=SC2154 # lib.sh and up set the variables
# The cluster's own certificate authority and the kubeconfigs that carry its
# certificates. For tests on loopback only: the CA's key lies beside them.

make_certificates() {
  mkdir -p "$state/pki"
  pushd "$state/pki" >/dev/null || return
  new_key ca -x509 -subj /CN=kube-tunnel-test-ca -days 3650 -out ca.crt
  issue apiserver /CN=kube-apiserver DNS:localhost,IP:127.0.0.1,IP:10.96.0.1,DNS:kubernetes.default.svc
  issue kubelet-server "/O=system:nodes/CN=system:node:$node_name" "DNS:$node_name,IP:$node_ip"
  issue apiserver-to-kubelet /O=system:masters/CN=kube-apiserver-kubelet-client
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out service-account.key
  openssl pkey -in service-account.key -pubout -out service-account.pub

  make_kubeconfig "$kubeconfig" admin /O=system:masters/CN=kube-tunnel-test-admin
  local name
  for name in kube-controller-manager kube-scheduler; do
    make_kubeconfig "$state/$name.kubeconfig" "$name" "/CN=system:$name"
  done
  make_kubeconfig "$state/kubelet.kubeconfig" kubelet "/O=system:nodes/CN=system:node:$node_name"
  popd >/dev/null || return
}

new_key() {
  local name=$1
  shift
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$name.key" "$@" 2>/dev/null
}

# issue NAME SUBJECT [SUBJECT-ALTERNATIVE-NAMES]
issue() {
  new_key "$1" -subj "$2" -out "$1.csr"
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out "$1.crt" \
    -extfile <(echo "extendedKeyUsage=clientAuth,serverAuth${3:+
subjectAltName=$3}") 2>/dev/null
}

# make_kubeconfig FILE NAME SUBJECT: all in one file, so that it can be copied.
make_kubeconfig() {
  issue "$2" "$3"
  cat >"$1" <<END
apiVersion: v1
kind: Config
current-context: kube-tunnel-test
clusters:
- name: kube-tunnel-test
  cluster:
    server: https://127.0.0.1:$api_port
    certificate-authority-data: $(base64 -w0 ca.crt)
users:
- name: $2
  user:
    client-certificate-data: $(base64 -w0 "$2.crt")
    client-key-data: $(base64 -w0 "$2.key")
contexts:
- name: kube-tunnel-test
  context: {cluster: kube-tunnel-test, user: $2, namespace: default}
END
  chmod 600 "$1"
}
