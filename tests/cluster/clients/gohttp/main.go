// What a Go program does through the tunnel: net/http in each version of HTTP, and grpc-go.
//
//	gohttp HTTP_HOST:PORT GRPC_HOST:PORT CERTIFICATE
package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
)

func main() {
	log.SetFlags(0)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	web, rpc := os.Args[1], os.Args[2]
	pem, err := os.ReadFile(os.Args[3])
	must(err)
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		log.Fatalf("no certificate in %s", os.Args[3])
	}
	trusting := &tls.Config{RootCAs: roots}

	for _, c := range []struct {
		scheme string
		set    func(*http.Protocols)
		proto  string
	}{
		{"http", func(p *http.Protocols) { p.SetHTTP1(true) }, "HTTP/1.1"},
		{"http", func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) }, "HTTP/2.0"},
		{"https", func(p *http.Protocols) { p.SetHTTP1(true) }, "HTTP/1.1"},
		{"https", func(p *http.Protocols) { p.SetHTTP2(true) }, "HTTP/2.0"},
	} {
		protocols := new(http.Protocols)
		c.set(protocols)
		client := &http.Client{Transport: &http.Transport{Protocols: protocols, TLSClientConfig: trusting.Clone()}}
		check(ctx, client, c.scheme+"://"+web, c.proto)
		log.Printf("%s in %s", c.proto, c.scheme)
	}

	_, err = http.Get("https://" + web + "/hello")
	var untrusted x509.UnknownAuthorityError
	if !errors.As(err, &untrusted) {
		log.Fatalf("without the certificate: %v", err)
	}

	for _, credential := range []credentials.TransportCredentials{insecure.NewCredentials(), credentials.NewTLS(trusting)} {
		call(ctx, rpc, credential)
		log.Printf("gRPC, %s", credential.Info().SecurityProtocol)
	}
}

func check(ctx context.Context, client *http.Client, url, proto string) {
	var seen struct{ Target string }
	reply := do(ctx, client, http.MethodGet, url+"/hello?from=go", nil, proto)
	must(json.Unmarshal(reply.body, &seen))
	equal(seen.Target, "/hello?from=go")

	// Of unknown length, so that it goes in pieces.
	const text = "some text that is sent in many small pieces; "
	body := strings.Repeat(text, 10_000)
	var got struct {
		Bytes  int
		Sha256 string
	}
	reply = do(ctx, client, http.MethodPost, url+"/upload", struct{ io.Reader }{strings.NewReader(body)}, proto)
	must(json.Unmarshal(reply.body, &got))
	equal(got.Bytes, len(body))
	equal(got.Sha256, fmt.Sprintf("%x", sha256.Sum256([]byte(body))))

	reply = do(ctx, client, http.MethodGet, url+"/trailers", nil, proto)
	equal(reply.Trailer.Get("X-Body-Sha256"), fmt.Sprintf("%x", sha256.Sum256(reply.body)))
}

type reply struct {
	*http.Response
	body []byte
}

func do(ctx context.Context, client *http.Client, method, url string, body io.Reader, proto string) reply {
	request, err := http.NewRequestWithContext(ctx, method, url, body)
	must(err)
	request.Header.Set("TE", "trailers")
	response, err := client.Do(request)
	must(err)
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	must(err)
	equal(response.StatusCode, http.StatusOK)
	equal(response.Proto, proto)
	return reply{response, data}
}

func call(ctx context.Context, address string, credential credentials.TransportCredentials) {
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credential))
	must(err)
	defer conn.Close()
	client := testgrpc.NewTestServiceClient(conn)
	answer, err := client.UnaryCall(ctx, &testgrpc.SimpleRequest{ResponseSize: 1000})
	must(err)
	equal(len(answer.Payload.Body), 1000)

	stream, err := client.FullDuplexCall(ctx)
	must(err)
	for _, size := range []int32{1, 70_000, 3} {
		ask := &testgrpc.StreamingOutputCallRequest{ResponseParameters: []*testgrpc.ResponseParameters{{Size: size}}}
		must(stream.Send(ask))
		answer, err := stream.Recv()
		must(err)
		equal(int32(len(answer.Payload.Body)), size)
	}
	must(stream.CloseSend())
	_, err = stream.Recv()
	equal(err, io.EOF)
}

func equal[T comparable](got, want T) {
	if got != want {
		panic(fmt.Sprintf("got %v, want %v", got, want)) // says where
	}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
