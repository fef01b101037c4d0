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
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
)

// grpcServer answers gRPC that comes to the HTTP ports, whatever the protocol below.
var grpcServer = newGRPC(health.NewServer())

// newGRPC offers grpc-go's own interop test service, which its interop client knows by
// heart, and what grpcurl and health probes ask for. Each answer names the pod.
func newGRPC(checks *health.Server) *grpc.Server {
	name := metadata.Pairs("x-pod", podName)
	server := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, in any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			grpc.SetHeader(ctx, name)
			return next(ctx, in)
		}),
		grpc.StreamInterceptor(func(service any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			stream.SetHeader(name)
			return next(service, stream)
		}),
	)
	testgrpc.RegisterTestServiceServer(server, interop.NewTestServer())
	healthgrpc.RegisterHealthServer(server, checks)
	reflection.Register(server)
	return server
}

// serveGRPC is grpc-go's own transport, on a port of its own.
func serveGRPC() func(net.Listener) {
	checks := health.NewServer()
	server := newGRPC(checks)
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
