package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"
)

// keptBody is how much of a request's body /echo sends back as text.
const keptBody = 64 << 10

var podName = func() string {
	name, _ := os.Hostname() // an unnamed host answers with an empty name
	return name
}()

// route looks at the first part of the path only. Not http.ServeMux: that redirects an
// unclean path, and an echo must see it as it came.
func route(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		grpcServer.ServeHTTP(w, r)
		return
	}
	first, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	switch first {
	case "health":
		sendHealth(w, rest)
	case "last":
		w.Header().Set("Connection", "close") // this server's word: it takes no other request
		sendHealth(w, "")
	case "bytes":
		sendBytes(w, r, rest)
	case "upload":
		upload(w, r)
	case "sse":
		events(w, r)
	case "status":
		status(w, rest)
	case "slow":
		slow(w, r)
	case "trailers":
		trailers(w)
	case "cookies":
		cookies(w, r)
	case "ws":
		webSocket(w, r)
	case "pipe":
		pipe(w, r)
	case "mark":
		mark(w, r, rest)
	case "ledger":
		sendLedger(w, r, rest)
	case "hold":
		holdRequest(w, r, rest)
	case "cancelled":
		sendCancelled(w, rest)
	case "exit":
		os.Exit(1)
	default:
		echoRequest(w, r)
	}
}

func answer(w http.ResponseWriter, code int, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(value) // a peer that left is no error of ours
}

// sendHealth is what the readiness probe asks; /health/fail and /health/ok turn it.
func sendHealth(w http.ResponseWriter, turn string) {
	if turn != "" {
		healthy.Store(turn == "ok")
	}
	code, text := http.StatusOK, "ok"
	if !healthy.Load() {
		code, text = http.StatusServiceUnavailable, "unavailable"
	}
	answer(w, code, map[string]string{"status": text, "pod": podName, "version": os.Getenv("VERSION")})
}

// echoRequest answers with the request as this server saw it. Header names come in
// canonical form and sorted, as net/http keeps neither case nor order.
func echoRequest(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(io.LimitReader(r.Body, keptBody+1))
	rest, _ := io.Copy(io.Discard, r.Body)
	size := int64(len(body)) + rest
	var text *string
	if size <= keptBody && utf8.Valid(body) {
		text = new(string(body))
	}
	answer(w, http.StatusOK, map[string]any{
		"pod":        podName,
		"proto":      r.Proto,
		"method":     r.Method,
		"target":     r.RequestURI,
		"host":       r.Host,
		"headers":    pairs(r.Header),
		"body_bytes": size,
		"body":       text,
		"trailers":   pairs(r.Trailer),
	})
}

func pairs(header http.Header) [][2]string {
	list := [][2]string{}
	for name, values := range header {
		for _, value := range values {
			list = append(list, [2]string{name, value})
		}
	}
	slices.SortStableFunc(list, func(a, b [2]string) int { return strings.Compare(a[0], b[0]) })
	return list
}

// period of the download's content: byte i is i mod 251, a prime, so that a piece lost
// or doubled at any power of two shows.
const period = 251

var pattern = func() []byte {
	b := make([]byte, 64<<10+period)
	for i := range b {
		b[i] = byte(i % period)
	}
	return b
}()

func sendBytes(w http.ResponseWriter, r *http.Request, size string) {
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil || n < 0 {
		http.Error(w, "how many bytes?", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if r.URL.Query().Get("chunked") == "" {
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	} else {
		w.(http.Flusher).Flush()
	}
	for at := int64(0); at < n && r.Method != http.MethodHead; {
		start := at % period
		written, err := w.Write(pattern[start : start+min(64<<10, n-at)])
		if err != nil {
			return
		}
		at += int64(written)
	}
}

// upload swallows the body; ?hash=0 leaves out the checksum where speed is measured.
func upload(w http.ResponseWriter, r *http.Request) {
	var sink io.Writer = io.Discard
	var sum hash.Hash
	if r.URL.Query().Get("hash") != "0" {
		sum = sha256.New()
		sink = sum
	}
	n, err := io.Copy(sink, r.Body)
	if err != nil {
		return
	}
	reply := map[string]any{"pod": podName, "bytes": n}
	if sum != nil {
		reply["sha256"] = fmt.Sprintf("%x", sum.Sum(nil))
	}
	answer(w, http.StatusOK, reply)
}

// events sends count (10, 0 for no end) events, interval_ms (100) apart.
func events(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	count, err := strconv.Atoi(query.Get("count"))
	if err != nil {
		count = 10
	}
	interval := milliseconds(query.Get("interval_ms"), 100)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	for seq := 0; count == 0 || seq < count; seq++ {
		if seq > 0 && !pass(r, interval) {
			return
		}
		if _, err := fmt.Fprintf(w, "data: {\"seq\":%d,\"sent_unix_ns\":%d}\n\n", seq, time.Now().UnixNano()); err != nil {
			return
		}
		w.(http.Flusher).Flush()
	}
}

// pass waits, and says whether the peer is still there afterwards.
func pass(r *http.Request, wait time.Duration) bool {
	select {
	case <-time.After(wait):
		return true
	case <-r.Context().Done():
		return false
	}
}

func status(w http.ResponseWriter, text string) {
	code, err := strconv.Atoi(text)
	if err != nil || code < 200 || code > 999 {
		http.Error(w, "which status?", http.StatusBadRequest)
		return
	}
	if code == http.StatusNoContent || code == http.StatusNotModified {
		w.WriteHeader(code) // these have no body
		return
	}
	answer(w, code, map[string]any{"pod": podName, "status": code})
}

func slow(w http.ResponseWriter, r *http.Request) {
	if pass(r, milliseconds(r.URL.Query().Get("ms"), 1000)) {
		answer(w, http.StatusOK, map[string]string{"pod": podName})
	}
}

func trailers(w http.ResponseWriter) {
	w.Header().Set("Trailer", "X-Body-Sha256, X-Pod")
	body := []byte("the trailers follow\n")
	w.Write(body)
	w.(http.Flusher).Flush() // chunked: HTTP/1.1 has trailers in no other form
	w.Header().Set("X-Body-Sha256", fmt.Sprintf("%x", sha256.Sum256(body)))
	w.Header().Set("X-Pod", podName)
}

func cookies(w http.ResponseWriter, r *http.Request) {
	http.SetCookie(w, &http.Cookie{Name: "first", Value: "1", Path: "/"})
	http.SetCookie(w, &http.Cookie{Name: "second", Value: "2", Path: "/", HttpOnly: true})
	answer(w, http.StatusOK, map[string]any{"pod": podName, "cookies": len(r.Cookies())})
}

// webSocket echoes messages of any size and kind.
func webSocket(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{
		InsecureSkipVerify: true, // any origin: tests come under many names
		Subprotocols:       []string{"echo"},
	})
	if err != nil {
		return
	}
	defer conn.CloseNow()
	conn.SetReadLimit(-1)
	for {
		kind, message, err := conn.Read(r.Context())
		if err != nil {
			return // Read has answered a close frame
		}
		if conn.Write(r.Context(), kind, message) != nil {
			return
		}
	}
}
