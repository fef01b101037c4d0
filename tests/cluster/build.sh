# shellcheck shell=bash disable=SC2154 # lib.sh and up set the variables
# Builds, once each, what the cluster runs: every result has a folder in the cache,
# named after a hash of all that went into it. Needs Go, Python and their package servers only.

kubernetes_version=$(awk '$1 == "k8s.io/kubernetes" { print $2; exit }' "$here/kubernetes/go.mod")

# cached NAME: where the result of the folder tests/cluster/NAME belongs.
cached() {
  local key
  key=$({ go env GOVERSION GOARCH && cd "$here/$1" && find . \( -name '*.go' -o -name 'go.*' -o -name requirements.txt \) -print0 | LC_ALL=C sort -z | xargs -0 cat -- "$here/build.sh"; } | sha256sum)
  echo "$cache/$1-${key:0:12}"
}

# build NAME: prints the folder, filled by build_NAME if this is the first time.
build() {
  local folder
  command -v go >/dev/null || die "the cluster is built with Go: put go on PATH"
  folder=$(cached "$1")
  if [[ ! -d $folder ]]; then
    say "building $1 (once) ..."
    local unfinished=$folder.unfinished
    rm -rf "$unfinished"
    mkdir -p "$unfinished"
    (
      cd "$here/$1" || exit
      "build_$1" "$unfinished"
    ) >&2
    mv "$unfinished" "$folder"
  fi
  echo "$folder"
}

go_build() {
  # -buildvcs=false: the key above says what is in it, and a repository may have no commit yet.
  CGO_ENABLED=0 nice -n 5 go build -mod=readonly -trimpath -buildvcs=false "$@"
}

build_kubernetes() {
  local package=k8s.io/component-base/version minor=${kubernetes_version#v1.} flags name
  # Without these, clients take the server for v0.0.0 and some refuse to talk to it.
  flags="-s -w -X $package.gitVersion=$kubernetes_version -X $package.gitMajor=1 -X $package.gitMinor=${minor%%.*}"
  go_build -o "$1/kubernetes" -ldflags "$flags" .
  go_build -o "$1/kubectl" -ldflags "$flags" ./kubectl
  for name in kube-apiserver kube-controller-manager kube-scheduler kubelet; do
    ln -s kubernetes "$1/$name"
  done
}

build_kubectl() {
  local package=k8s.io/component-base/version file version
  for file in go.1.29.mod go.mod; do
    version=$(awk '$1 == "k8s.io/kubectl" { print $2; exit }' "$file")
    version=${version#v0.}
    go_build -modfile "$file" -o "$1/kubectl-1.${version%.*}" -ldflags "-s -w -X $package.gitVersion=v1.$version \
      -X $package.gitMajor=1 -X $package.gitMinor=${version%.*}" .
  done
}

build_etcd() { go_build -ldflags '-s -w' -o "$1/etcd" .; }

build_images() {
  go_build -ldflags '-s -w' -o "$1/" ./server ./pause ./ocitar
  "$1/ocitar" "docker.io/$server_image" "$1/server" >"$1/server.tar"
  "$1/ocitar" "docker.io/$pause_image" "$1/pause" >"$1/pause.tar"
}

build_clients() {
  go_build -ldflags '-s -w' -o "$1/grpcurl" github.com/fullstorydev/grpcurl/cmd/grpcurl
  go_build -ldflags '-s -w' -o "$1/grpc-interop-client" google.golang.org/grpc/interop/client
  go_build -ldflags '-s -w' -o "$1/h2spec" github.com/summerwind/h2spec/cmd/h2spec
  go_build -ldflags '-s -w' -o "$1/gohttp" ./gohttp
}

# A virtual environment that works wherever it is moved, as long as its python is called.
build_python() {
  python3 -m venv "$1"
  "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt
}
