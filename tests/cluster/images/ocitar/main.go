// ocitar writes an image of one static binary as an OCI layout tar, ready for
// `ctr images import`: no registry, no image builder. The same input gives the same
// bytes.
//
//	ocitar NAME BINARY >image.tar
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"runtime"
)

type object map[string]any

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: ocitar NAME BINARY >image.tar")
	}
	if err := write(os.Stdout, os.Args[1], os.Args[2]); err != nil {
		log.Fatal("ocitar: ", err)
	}
}

func write(out io.Writer, name, binary string) error {
	program, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	entry := filepath.Base(binary)
	var layerTar bytes.Buffer
	layer := tar.NewWriter(&layerTar)
	if err := add(layer, entry, 0o755, program); err != nil {
		return err
	}
	if err := layer.Close(); err != nil {
		return err
	}

	image := tar.NewWriter(out)
	layerRef, err := blob(image, "application/vnd.oci.image.layer.v1.tar", layerTar.Bytes())
	if err != nil {
		return err
	}
	configRef, err := blobJSON(image, "application/vnd.oci.image.config.v1+json", object{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       object{"Entrypoint": []string{"/" + entry}},
		"rootfs":       object{"type": "layers", "diff_ids": []any{layerRef["digest"]}},
	})
	if err != nil {
		return err
	}
	manifestRef, err := blobJSON(image, "application/vnd.oci.image.manifest.v1+json", object{
		"schemaVersion": 2,
		"mediaType":     "application/vnd.oci.image.manifest.v1+json",
		"config":        configRef,
		"layers":        []object{layerRef},
	})
	if err != nil {
		return err
	}
	manifestRef["annotations"] = object{"io.containerd.image.name": name}
	index, err := json.Marshal(object{"schemaVersion": 2, "manifests": []object{manifestRef}})
	if err != nil {
		return err
	}
	if err := add(image, "index.json", 0o644, index); err != nil {
		return err
	}
	if err := add(image, "oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return err
	}
	return image.Close()
}

func blobJSON(image *tar.Writer, mediaType string, value object) (object, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	return blob(image, mediaType, data)
}

// blob adds data under its digest and returns the descriptor that refers to it.
func blob(image *tar.Writer, mediaType string, data []byte) (object, error) {
	digest := fmt.Sprintf("%x", sha256.Sum256(data))
	return object{"mediaType": mediaType, "digest": "sha256:" + digest, "size": len(data)},
		add(image, "blobs/sha256/"+digest, 0o644, data)
}

func add(to *tar.Writer, name string, mode int64, data []byte) error {
	if err := to.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
		return err
	}
	_, err := to.Write(data)
	return err
}
