// The etcd server, as go.etcd.io/etcd/server/v3's own main: a module of its own, so
// that its dependency versions need not agree with Kubernetes'.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
