# shellcheck shell=bash disable=SC2154 # lib.sh and up set the variables
# The configuration files of containerd, of its network plugin and of the kubelet.

write_configs() {
  mkdir -p "$state/cni"
  write_containerd_config >"$state/containerd.toml"
  write_network_config >"$state/cni/10-bridge.conflist"
  write_kubelet_config >"$state/kubelet.yaml"
}

# restrict_oom_score_adj: without CAP_SYS_RESOURCE nothing may lower its score, and every
# sandbox would die of trying. The plugin "opt" makes a folder on the host.
write_containerd_config() {
  local version
  version=$("$containerd" --version | grep -oE ' v?[0-9]+\.[0-9]+' | head -1)
  version=${version# }
  version=${version#v}
  case $version in
    1.*)
      cat <<END
version = 2
disabled_plugins = ["io.containerd.internal.v1.opt"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/$pause_image"
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "$state/cni"
END
      ;;
    *)
      local cni_folders='bin_dirs = ["/usr/lib/cni"]'
      [[ $version != 2.0 ]] || cni_folders='bin_dir = "/usr/lib/cni"'
      cat <<END
version = 3
disabled_plugins = ["io.containerd.internal.v1.opt"]
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "docker.io/$pause_image"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins."io.containerd.cri.v1.runtime".cni]
  $cni_folders
  conf_dir = "$state/cni"
END
      ;;
  esac
}

# No gateway: the plugin would switch on forwarding for the whole host. The node's own
# address on the bridge is all that probes need.
write_network_config() {
  cat <<END
{
  "cniVersion": "1.0.0",
  "name": "kube-tunnel-test",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "$bridge",
      "isGateway": false,
      "ipam": { "type": "host-local", "ranges": [[{ "subnet": "$pod_range" }]] }
    }
  ]
}
END
}

# clusterDNS: nobody answers there; without it every pod gets a warning event.
write_kubelet_config() {
  cat <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $node_ip
port: $kubelet_port
healthzPort: $kubelet_health_port
tlsCertFile: $state/pki/kubelet-server.crt
tlsPrivateKeyFile: $state/pki/kubelet-server.key
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: $state/pki/ca.crt}
authorization: {mode: Webhook}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /$cgroup
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
enforceNodeAllocatable: []
makeIPTablesUtilChains: false
enableControllerAttachDetach: false
volumePluginDir: /var/lib/kubelet/volume-plugins
resolvConf: ""
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
serializeImagePulls: false
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}
END
}
