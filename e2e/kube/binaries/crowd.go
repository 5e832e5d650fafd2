package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	core "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
)

// newCrowdCommand is many `kubectl exec` in one process, with the library that kubectl has for it: two hundred kubectl
// take 3 GiB, most of which is two hundred times the same list of types.
func newCrowdCommand() *cobra.Command {
	var container, folder string
	var count int
	command := &cobra.Command{
		Use:   "kube-crowd POD --count N --into FOLDER -- COMMAND...",
		Short: "Many exec at once; {} in the command is the number of each, and FOLDER/N gets its standard output",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(command *cobra.Command, args []string) error {
			loading := clientcmd.NewDefaultClientConfigLoadingRules()
			config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(loading, nil).ClientConfig()
			if err != nil {
				return err
			}
			failed := make([]error, count)
			var all sync.WaitGroup
			for number := range count {
				all.Go(func() {
					failed[number] = one(command.Context(), config, args[0], container, folder, number, args[1:])
				})
			}
			all.Wait()
			return errors.Join(failed...)
		},
		SilenceUsage: true,
	}
	command.Flags().StringVarP(&container, "container", "c", "", "the container")
	command.Flags().StringVar(&folder, "into", ".", "where the output goes")
	command.Flags().IntVar(&count, "count", 1, "how many")
	return command
}

// Every second one goes by WebSocket, the others by SPDY.
func one(ctx context.Context, config *rest.Config, pod, container, folder string, number int, words []string) error {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	options := &core.PodExecOptions{Container: container, Stdout: true, Stderr: true}
	for _, word := range words {
		options.Command = append(options.Command, strings.ReplaceAll(word, "{}", strconv.Itoa(number)))
	}
	url := client.CoreV1().RESTClient().Post().Namespace("default").Resource("pods").Name(pod).SubResource("exec").
		VersionedParams(options, scheme.ParameterCodec).URL()
	var executor remotecommand.Executor
	if number%2 == 0 {
		executor, err = remotecommand.NewWebSocketExecutor(config, "GET", url.String())
	} else {
		executor, err = remotecommand.NewSPDYExecutor(config, "POST", url)
	}
	if err != nil {
		return err
	}
	var out, said bytes.Buffer
	if err := executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Stderr: &said}); err != nil {
		return fmt.Errorf("%d: %w: %s", number, err, said.String())
	}
	return os.WriteFile(filepath.Join(folder, strconv.Itoa(number)), out.Bytes(), 0o644)
}
