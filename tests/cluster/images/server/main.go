// The test server of the cluster's pods: every protocol the tests send through a
// tunnel, in one static binary that listens on all its ports at once. A flag, or the
// environment variable of the same name in capitals with ADDR_ before it, moves a port.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// shutdownTime is what running requests get to end in; pods have 5 s in all.
const shutdownTime = 3 * time.Second

// healthy is what /health answers by: turned by /health/ok and /health/fail, false from SIGTERM on.
var healthy atomic.Bool

func main() {
	http1 := protocols(func(p *http.Protocols) { p.SetHTTP1(true) })
	h2c := protocols(func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) })
	both := protocols(func(p *http.Protocols) { p.SetHTTP1(true); p.SetUnencryptedHTTP2(true) })
	h2 := protocols(func(p *http.Protocols) { p.SetHTTP2(true) })
	bothTLS := protocols(func(p *http.Protocols) { p.SetHTTP1(true); p.SetHTTP2(true) })
	handler := http.HandlerFunc(route)

	servers := []struct {
		name, address, use string
		serve              func(net.Listener)
	}{
		{"http", ":8080", "HTTP/1.1 and h2c", serveHTTP(handlerWithUpgrade(handler), both)},
		{"h1", ":8081", "HTTP/1.1 only", serveHTTP(handler, http1)},
		{"h2c", ":8082", "h2c only", serveHTTP(handler, h2c)},
		{"https", ":8443", "TLS with h2 and HTTP/1.1", serveTLS(handler, bothTLS)},
		{"https1", ":8444", "TLS with HTTP/1.1 only", serveTLS(handler, http1)},
		{"https2", ":8445", "TLS with h2 only", serveTLS(handler, h2)},
		{"tcp", ":9000", "TCP echo", serveTCP(echo)},
		{"greet", ":9001", "TCP greeting, then echo", serveTCP(greet)},
		{"hold", ":9002", "TCP that never reads", serveTCP(hold)},
		{"reset", ":9003", "TCP reset after the first byte", serveTCP(reset)},
		{"flood", ":9004", "TCP that writes until the peer goes", serveTCP(flood)},
		{"grpc", ":50051", "gRPC interop, health and reflection", serveGRPC()},
	}
	addresses := make([]*string, len(servers))
	for i, s := range servers {
		address := s.address
		if moved, ok := os.LookupEnv("ADDR_" + strings.ToUpper(s.name)); ok {
			address = moved
		}
		addresses[i] = flag.String(s.name, address, s.use)
	}
	flag.Parse()

	terminated, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	for i, s := range servers {
		listener, err := net.Listen("tcp", *addresses[i])
		if err != nil {
			log.Fatal(err)
		}
		go s.serve(listener)
	}
	healthy.Store(true)
	log.Printf("%s is ready", podName)

	<-terminated.Done()
	healthy.Store(false)
	time.Sleep(milliseconds(os.Getenv("PRESTOP_MS"), 0))
	shutdown()
}

// atShutdown holds what ends each server's running requests; filled before any serves.
var atShutdown []func(context.Context)

func shutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTime)
	defer cancel()
	ended := make(chan struct{})
	for _, end := range atShutdown {
		go func() { end(ctx); ended <- struct{}{} }()
	}
	for range atShutdown {
		<-ended
	}
}

// milliseconds reads a duration, or gives the default where there is none.
func milliseconds(text string, otherwise int) time.Duration {
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		n = otherwise
	}
	return time.Duration(n) * time.Millisecond
}
