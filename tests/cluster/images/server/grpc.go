package main

import (
	"context"
	"log"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/reflection"
)

// serveGRPC offers grpc-go's own interop test service, which its interop client
// knows by heart, and what grpcurl and health probes ask for.
func serveGRPC() func(net.Listener) {
	server := grpc.NewServer()
	testgrpc.RegisterTestServiceServer(server, interop.NewTestServer())
	checks := health.NewServer()
	healthgrpc.RegisterHealthServer(server, checks)
	reflection.Register(server)
	atShutdown = append(atShutdown, func(ctx context.Context) {
		checks.Shutdown()
		defer context.AfterFunc(ctx, server.Stop)()
		server.GracefulStop()
	})
	return func(l net.Listener) {
		if err := server.Serve(l); err != nil {
			log.Fatal(err)
		}
	}
}
