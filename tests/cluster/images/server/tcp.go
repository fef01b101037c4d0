package main

import (
	"io"
	"log"
	"net"
)

func serveTCP(handle func(*net.TCPConn)) func(net.Listener) {
	return func(l net.Listener) {
		for {
			conn, err := l.Accept()
			if err != nil {
				log.Fatal(err)
			}
			go func() {
				defer conn.Close()
				handle(conn.(*net.TCPConn))
			}()
		}
	}
}

// echo passes a half-close on: the peer gets its last bytes, then the end.
func echo(conn *net.TCPConn) {
	io.Copy(conn, conn)
}

func greet(conn *net.TCPConn) {
	if _, err := io.WriteString(conn, "220 "+podName+" kube-tunnel-test\r\n"); err == nil {
		echo(conn)
	}
}

// hold keeps the connection and reads nothing, so that the peer's window fills.
func hold(*net.TCPConn) {
	select {}
}

func reset(conn *net.TCPConn) {
	conn.Read(make([]byte, 1))
	conn.SetLinger(0)
}

func flood(conn *net.TCPConn) {
	for {
		if _, err := conn.Write(pattern[:len(pattern)/period*period]); err != nil {
			return
		}
	}
}
