package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"
)

// ledger counts how often each id was seen, in the one pod that the others report to.
var ledger = struct {
	sync.Mutex
	seen map[string]int
}{seen: map[string]int{}}

// mark reports the request's id to the ledger of the pod at LEDGER (an address and a port)
// before it reads the body: a request counts from its head on, whatever becomes of it.
// Outlives this pod, so that what was sent twice shows even if the first pod has gone.
func mark(w http.ResponseWriter, r *http.Request, id string) {
	reply, err := http.Post("http://"+os.Getenv("LEDGER")+"/ledger/"+url.PathEscape(id), "", nil)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	reply.Body.Close()
	if _, err := io.Copy(io.Discard, r.Body); err == nil {
		answer(w, http.StatusOK, map[string]string{"pod": podName})
	}
}

// sendLedger counts an id (POST), or tells how often one was seen; without an id, how many
// there are and which of them were seen more than once.
func sendLedger(w http.ResponseWriter, r *http.Request, id string) {
	ledger.Lock()
	defer ledger.Unlock()
	if r.Method == http.MethodPost {
		ledger.seen[id]++
	}
	if id != "" {
		answer(w, http.StatusOK, ledger.seen[id])
		return
	}
	repeated := []string{}
	for id, times := range ledger.seen {
		if times > 1 {
			repeated = append(repeated, id)
		}
	}
	answer(w, http.StatusOK, map[string]any{"ids": len(ledger.seen), "repeated": repeated})
}

// cancelled holds when the peer of each /hold left.
var cancelled sync.Map

// holdRequest sends a head, then nothing more until the peer leaves, and notes when that was.
func holdRequest(w http.ResponseWriter, r *http.Request, id string) {
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	<-r.Context().Done()
	cancelled.Store(id, time.Now().UnixNano())
}

// sendCancelled tells when the peer of /hold/ID left, in nanoseconds since 1970.
func sendCancelled(w http.ResponseWriter, id string) {
	at, ok := cancelled.Load(id)
	if !ok {
		answer(w, http.StatusNotFound, nil)
		return
	}
	answer(w, http.StatusOK, at)
}

// pipe sends back each piece of the body when it comes, while more of it is to follow.
func pipe(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	if err := control.EnableFullDuplex(); err != nil && r.ProtoMajor == 1 {
		http.Error(w, fmt.Sprint(err), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusOK)
	control.Flush()
	piece := make([]byte, 64<<10)
	for {
		n, err := r.Body.Read(piece)
		if _, failed := w.Write(piece[:n]); failed != nil || control.Flush() != nil || err != nil {
			return
		}
	}
}
