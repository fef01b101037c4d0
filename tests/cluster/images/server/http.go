package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/h2c"
)

// quiet: a peer that resets its connection is what many tests are about, not news.
var quiet = log.New(io.Discard, "", 0)

func protocols(set func(*http.Protocols)) *http.Protocols {
	p := new(http.Protocols)
	set(p)
	return p
}

// handlerWithUpgrade also answers `Upgrade: h2c`, which net/http leaves out.
func handlerWithUpgrade(handler http.Handler) http.Handler {
	return h2c.NewHandler(handler, new(http2.Server))
}

func newServer(handler http.Handler, p *http.Protocols) *http.Server {
	server := &http.Server{
		Handler:                      handler,
		Protocols:                    p,
		ErrorLog:                     quiet,
		DisableGeneralOptionsHandler: true, // `OPTIONS *` is to be echoed, too
	}
	atShutdown = append(atShutdown, func(ctx context.Context) {
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
	})
	return server
}

func serveHTTP(handler http.Handler, p *http.Protocols) func(net.Listener) {
	server := newServer(handler, p)
	return func(l net.Listener) { ends(server.Serve(l)) }
}

// serveTLS offers by ALPN what p holds.
func serveTLS(handler http.Handler, p *http.Protocols) func(net.Listener) {
	server := newServer(handler, p)
	server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{selfSigned()}}
	return func(l net.Listener) { ends(server.ServeTLS(l, "", "")) }
}

func ends(err error) {
	if err != http.ErrServerClosed {
		log.Fatal(err)
	}
}

func selfSigned() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "kube-tunnel-test"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(1, 0, 0),
		DNSNames:     []string{"localhost", "*.default", "*.default.svc.cluster.local"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		log.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
